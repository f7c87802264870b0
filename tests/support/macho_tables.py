"""Reads what macOS itself checks and uses in a Mach-O file: the signature, and the unwind tables.

Both are written by zig's linker, which few have used for macOS, and a mistake in either shows late:
dyld kills a process that touches a page whose hash is wrong, and an exception that meets a wrong
entry ends it, or goes past the handler.

Formats: <kern/cs_blobs.h>, <mach-o/compact_unwind_encoding.h>, and DWARF's .eh_frame of the Linux
Standard Base.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lief

ADHOC = 0x2
SHA256 = 2


@dataclass(frozen=True)
class Signature:
    """The code directory of a signature."""

    flags: int
    hash_type: int
    page: int  # bytes
    code_limit: int  # bytes that are signed
    position: int  # of the signature in the file
    identifier: str
    wrong_pages: list[int]
    pages: int


def signature(path: Path) -> Signature:
    """The signature of a file, and the pages whose hash is not that of their bytes.

    Raises ValueError if there is none.
    """
    data = path.read_bytes()
    binary = _parse(path)
    if not binary.has_code_signature:
        raise ValueError(f"{path} is not signed")
    command = binary.code_signature
    assert command is not None
    blob = data[command.data_offset : command.data_offset + command.data_size]
    magic, _, count = struct.unpack_from(">III", blob)
    if magic != 0xFADE0CC0:
        raise ValueError(f"a signature that begins with {magic:#x}")
    for i in range(count):
        _, offset = struct.unpack_from(">II", blob, 12 + 8 * i)
        if struct.unpack_from(">I", blob, offset)[0] == 0xFADE0C02:
            return _directory(data, blob[offset:], command.data_offset)
    raise ValueError("a signature without a code directory")


def _directory(data: bytes, blob: bytes, position: int) -> Signature:
    fields = struct.unpack_from(">9I4B", blob)
    _, _, _, flags, hashes, identifier, _, pages, limit = fields[:9]
    hash_size, hash_type, _, page_bits = fields[9:]
    page = 1 << page_bits
    wrong = []
    for i in range(pages):
        bytes_of_page = data[i * page : min((i + 1) * page, limit)]
        start = hashes + i * hash_size
        if hashlib.sha256(bytes_of_page).digest()[:hash_size] != blob[start : start + hash_size]:
            wrong.append(i)
    name = blob[identifier : blob.index(b"\0", identifier)].decode()
    return Signature(flags, hash_type, page, limit, position, name, wrong, pages)


@dataclass(frozen=True)
class Function:
    """What unwinding is told of a function. Addresses are those of the file."""

    start: int
    end: int  # where the next one begins
    encoding: int
    personality: int | None  # where the pointer to it is
    lsda: int | None  # its table of handlers
    frame: Frame | None  # of DWARF, if the encoding refers to it

    @property
    def mode(self) -> int:
        return self.encoding >> 24 & 0xF


DWARF = 3  # a mode


@dataclass(frozen=True)
class Frame:
    """A frame description entry of __eh_frame."""

    start: int
    end: int
    personality: int | None
    lsda: int | None


def functions(path: Path) -> list[Function]:
    """Every entry of __unwind_info, in order."""
    image = _Sections(path)
    info = image["__unwind_info"]
    frames = _Frames(image["__eh_frame"])
    _, common_at, common_count, personality_at, personality_count, index_at, index_count = (
        struct.unpack_from("<7I", info.data)
    )
    common = struct.unpack_from(f"<{common_count}I", info.data, common_at)
    personalities = struct.unpack_from(f"<{personality_count}I", info.data, personality_at)
    index = [struct.unpack_from("<3I", info.data, index_at + 12 * i) for i in range(index_count)]
    lsdas: dict[int, int] = {}
    for at in range(index[0][2], index[-1][2], 8):
        start, lsda = struct.unpack_from("<2I", info.data, at)
        lsdas[start] = lsda
    entries: list[tuple[int, int]] = []
    for first, page, _ in index[:-1]:
        entries += _page(info.data, page, first, common)
    ends = [*(start for start, _ in entries[1:]), index[-1][0]]
    result = []
    for (start, encoding), end in zip(entries, ends, strict=True):
        which = encoding >> 28 & 3
        mode = encoding >> 24 & 0xF
        result.append(
            Function(
                start,
                end,
                encoding,
                personalities[which - 1] if which else None,
                lsdas.get(start),
                frames.at(encoding & 0xFFFFFF) if mode == DWARF else None,
            )
        )
    return result


def _page(data: bytes, at: int, first: int, common: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Start and encoding of each function of a second-level page."""
    (kind,) = struct.unpack_from("<I", data, at)
    entries, count = struct.unpack_from("<2H", data, at + 4)
    if kind == 2:
        for i in range(count):
            yield struct.unpack_from("<2I", data, at + entries + 8 * i)
        return
    encodings, encoding_count = struct.unpack_from("<2H", data, at + 8)
    own = struct.unpack_from(f"<{encoding_count}I", data, at + encodings)
    for i in range(count):
        (entry,) = struct.unpack_from("<I", data, at + entries + 4 * i)
        which = entry >> 24
        encoding = common[which] if which < len(common) else own[which - len(common)]
        yield first + (entry & 0xFFFFFF), encoding


@dataclass(frozen=True)
class _Section:
    address: int
    data: bytes


class _Sections:
    """The sections of a file, by name."""

    def __init__(self, path: Path) -> None:
        data, binary = path.read_bytes(), _parse(path)
        self._sections = {
            str(s.name): _Section(s.virtual_address, data[s.offset : s.offset + s.size])
            for s in binary.sections
        }

    def __getitem__(self, name: str) -> _Section:
        return self._sections.get(name, _Section(0, b""))


class _Frames:
    """Reads __eh_frame."""

    def __init__(self, section: _Section) -> None:
        self._section = section

    def at(self, offset: int) -> Frame:
        """The entry at an offset of the section."""
        data = self._section.data
        _, distance = struct.unpack_from("<2I", data, offset)
        pointer, language, personality = self._common(offset + 4 - distance)
        place = offset + 8
        start, place = self._pointer(place, pointer)
        length, place = self._pointer(place, pointer & 0x0F)
        lsda = None
        if language is not None:
            _, place = self._uleb(place)
            lsda, _ = self._pointer(place, language)
        assert start is not None
        assert length is not None
        return Frame(start, start + length, personality, lsda)

    def _common(self, offset: int) -> tuple[int, int | None, int | None]:
        """Encodings of the pointers and of the handlers' tables, and the personality."""
        data = self._section.data
        if struct.unpack_from("<I", data, offset + 4)[0] != 0:
            raise ValueError(f"no common information at {offset:#x} of __eh_frame")
        end = data.index(b"\0", offset + 9)
        augmentation, place = data[offset + 9 : end].decode(), end + 1
        for _ in range(3):  # alignments of code and data, the return address's register
            _, place = self._uleb(place)
        pointer, language, personality = 0, None, None
        if augmentation.startswith("z"):
            _, place = self._uleb(place)
            for letter in augmentation[1:]:
                if letter == "P":
                    personality, place = self._pointer(place + 1, data[place] & 0x7F)
                    continue
                if letter == "R":
                    pointer = data[place]
                elif letter == "L":
                    language = data[place]
                place += 1
        return pointer, language, personality

    def _uleb(self, place: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = self._section.data[place]
            value |= (byte & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if byte & 0x80 == 0:
                return value, place

    def _pointer(self, place: int, encoding: int) -> tuple[int | None, int]:
        """A pointer in one of DWARF's encodings; a null one is None."""
        formats = {0x0: "<q", 0x4: "<q", 0xC: "<q", 0x3: "<I", 0xB: "<i"}
        form = formats[encoding & 0x0F]
        (value,) = struct.unpack_from(form, self._section.data, place)
        if value != 0 and encoding & 0x70 == 0x10:  # relative to where it is
            value += self._section.address + place
        return value or None, place + struct.calcsize(form)


def _parse(path: Path) -> lief.MachO.Binary:
    # lief's objects refer to the file's, which must outlive them.
    file = _FILES.setdefault(path, lief.MachO.parse(str(path)))
    if file is None or file.size != 1 or (binary := file.at(0)) is None:
        raise ValueError(f"{path} is not a Mach-O file of one architecture.")
    return binary


_FILES: dict[Path, lief.MachO.FatBinary | None] = {}


def address_of_section(path: Path, name: str) -> range:
    """The addresses of a section."""
    section = _Sections(path)[name]
    return range(section.address, section.address + len(section.data))


def bound(path: Path) -> set[str]:
    """The symbols that dyld binds: of those that are undefined not all are used."""
    return {str(b.symbol.name) for b in _parse(path).bindings if b.symbol is not None}


def bound_at(path: Path, address: int) -> str | None:
    """The symbol that dyld writes the address of there."""
    for binding in _parse(path).bindings:
        if binding.address == address and binding.symbol is not None:
            return str(binding.symbol.name)
    return None
