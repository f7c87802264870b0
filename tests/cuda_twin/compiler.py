"""Compiles Metal source for an NVIDIA GPU with NVRTC, and reads what each kernel needs of it.

NVRTC comes from PyPI (nvidia-cuda-nvrtc), is called through NVIDIA's cuda-bindings, and needs
neither a GPU nor a CUDA toolkit. Its output is kept in ``build/cuda/programs``; a machine without
NVRTC can use a copy of that folder.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from locks import exclusively

from .source import Parameter, translate

DIRECTORY = Path(__file__).resolve().parent
CACHE = DIRECTORY.parents[1] / "build" / "cuda" / "programs"
INCLUDE = (DIRECTORY / "include", DIRECTORY.parent / "simulator" / "include")

# Of a multiprocessor: registers, allotted in blocks to each of its warps, and warps in fours.
REGISTERS = 65536
REGISTER_BLOCK = 256
WARP_BLOCK = 4
WARP = 32
MOST_THREADS = 1024

OPTIONS = [
    "--std=c++20",
    "--device-as-default-execution-space",
    "--fmad=true",  # as Apple's compiler contracts
    "--prec-div=true",  # as in Metal's safe mathematics
    "--prec-sqrt=true",
    "--disable-warnings",  # Metal's attributes
    "--ptxas-options=-v",
    "-D__METAL__=1",
    "-D__METAL_VERSION__=310",
]

PROPERTIES = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.S,
)


class CompileError(RuntimeError):
    """The source does not compile."""


@dataclass(frozen=True)
class Resources:
    """Registers and memory of each thread of a kernel, and shared memory of a threadgroup."""

    registers: int
    stack_bytes: int  # arrays that do not fit registers
    spill_bytes: int  # written and read
    shared_bytes: int

    @property
    def most_threads(self) -> int:
        """Threads of the largest group whose registers fit a multiprocessor."""
        of_warp = -(-self.registers * WARP // REGISTER_BLOCK) * REGISTER_BLOCK
        warps = REGISTERS // of_warp // WARP_BLOCK * WARP_BLOCK
        return min(warps * WARP, MOST_THREADS)


# Values of function constants with their indices, without those that are zero.
Constants = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Program:
    """Compiled kernels, ready to be loaded, with some values of their function constants."""

    cubin: bytes
    ptx: str  # what the cubin was assembled from
    resources: dict[str, Resources]
    kernels: dict[str, tuple[Parameter, ...]]
    specialize: Callable[[Constants], Program] = field(compare=False, repr=False)
    constants: Constants = ()
    specialized: dict[Constants, Program] = field(default_factory=dict, compare=False, repr=False)

    def of(self, constants: Mapping[int, Any]) -> Program:
        """The program with these function constants, compiled when it is first asked for."""
        values = tuple((i, np.asarray(v).item()) for i, v in sorted(constants.items()) if v)
        if values == self.constants:
            return self
        if values not in self.specialized:
            self.specialized[values] = self.specialize(values)
        return self.specialized[values]


def compile_program(
    source: str,
    instantiations: Iterable[str],
    *,
    architecture: str = "sm_90",
    flush_denormals: bool = True,
    registers: int | None = None,
    constants: Constants = (),
    specialize: Callable[[Constants], Program] | None = None,
) -> Program:
    """Compiles Metal source text, with ``instantiations`` appended as a host does at run time.

    ``registers`` limits the registers of a thread; with None the compiler decides.
    ``specialize`` compiles for other function constants; by default, the same kernels.
    Raises CompileError with the compiler's messages.
    """
    instantiations = list(instantiations)
    translation = translate(source, instantiations, constants=dict(constants), registers=registers)

    def same_kernels(values: Constants) -> Program:
        return compile_program(
            source,
            instantiations,
            architecture=architecture,
            flush_denormals=flush_denormals,
            registers=registers,
            constants=values,
        )

    options = [
        *OPTIONS,
        f"--gpu-architecture={architecture}",
        f"--ftz={'true' if flush_denormals else 'false'}",
    ]
    cubin, ptx, log = _compile_once(translation.text, options)
    resources = read_resources(log)
    if resources.keys() != translation.kernels.keys():
        raise CompileError(f"the compiler does not say what each kernel takes:\n{log}")
    return Program(
        cubin, ptx, resources, translation.kernels, specialize or same_kernels, constants
    )


def read_resources(log: str) -> dict[str, Resources]:
    """What ptxas reports about each kernel."""
    found = {}
    for match in PROPERTIES.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["more"])
        found[match["kernel"]] = Resources(
            int(match["registers"]),
            int(match["stack"]),
            int(match["stores"]) + int(match["loads"]),
            int(shared[1]) if shared else 0,
        )
    return found


def _compile_once(text: str, options: Sequence[str]) -> tuple[bytes, str, str]:
    """The result of _compile, cached under a hash of its inputs, not of their paths.

    The cache also records the version of NVRTC: another version compiles again.
    """
    headers = sorted(path for folder in INCLUDE for path in folder.rglob("*") if path.is_file())
    parts = [text, *options, *(path.read_text() for path in headers)]
    path = CACHE / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    here = _compiler_version()
    with exclusively(path):
        if path.exists():
            version, found = pickle.loads(path.read_bytes())
            if here in (None, version):
                kept: tuple[bytes, str, str] = found
                return kept
        made = _compile(text, [*options, *(f"--include-path={folder}" for folder in INCLUDE)])
        unfinished = path.with_suffix(".new")
        unfinished.write_bytes(pickle.dumps((here, made)))
        unfinished.replace(path)
    return made


def _compiler_version() -> tuple[int, int] | None:
    """NVRTC's, or None where there is none."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):
        return None
    return major, minor


def _compile(text: str, options: Sequence[str]) -> tuple[bytes, str, str]:
    """The cubin of CUDA C++, its PTX, and the compiler's messages."""
    from cuda.bindings import nvrtc

    def checked(answer: tuple[Any, ...]) -> Any:
        """The results of a call without its status. Raises if it failed."""
        if answer[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{answer[0].name}\n{log()}")
        return answer[1] if len(answer) > 1 else None

    def log() -> str:
        size = nvrtc.nvrtcGetProgramLogSize(program)[1]
        messages = bytes(size)
        nvrtc.nvrtcGetProgramLog(program, messages)
        return messages.rstrip(b"\0").decode()

    program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernels.cu", 0, [], [])[1]
    try:
        encoded = [option.encode() for option in options]
        checked(nvrtc.nvrtcCompileProgram(program, len(encoded), encoded))
        cubin = bytes(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        ptx = bytes(checked(nvrtc.nvrtcGetPTXSize(program)))
        checked(nvrtc.nvrtcGetPTX(program, ptx))
        return cubin, ptx.rstrip(b"\0").decode(), log()
    finally:
        nvrtc.nvrtcDestroyProgram(program)
