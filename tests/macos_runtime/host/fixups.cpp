// Writes into an image the addresses that depend on where it was mapped (rebasing) and on where its
// imports are (binding). Apple's linker leaves these as chains of pointers, zig's as programs for a
// small machine (LC_DYLD_INFO); both formats are described in <mach-o/fixup-chains.h> and
// <mach-o/loader.h>. Everything is bound at once: there is no lazy binding.

#include <string.h>

#include "image.h"

namespace macho {

namespace {

template <typename T>
T read(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

void write(void* p, uint64_t value) { memcpy(p, &value, sizeof value); }

uint64_t uleb(const uint8_t*& p) {
  uint64_t value = 0;
  for (int shift = 0;; shift += 7) {
    value |= uint64_t{*p & 0x7fu} << shift;
    if ((*p++ & 0x80) == 0) return value;
  }
}

int64_t sleb(const uint8_t*& p) {
  int64_t value = 0;
  int shift = 0;
  uint8_t byte;
  do {
    byte = *p++;
    value |= static_cast<int64_t>(byte & 0x7fu) << shift;
    shift += 7;
  } while ((byte & 0x80) != 0);
  if (shift < 64 && (byte & 0x40) != 0) value |= -(int64_t{1} << shift);
  return value;
}

// -- Chained fixups.

struct ChainedHeader {
  uint32_t version, starts, imports, symbols, import_count, import_format, symbol_format;
};

struct Import {
  void* address;
  int64_t addend;
};

std::vector<Import> read_imports(const Image& image, const uint8_t* data) {
  const auto header = read<ChainedHeader>(data);
  constexpr uint32_t kPlain = 1, kAddend = 2;
  if (header.import_format != kPlain && header.import_format != kAddend) {
    fail("%s: chained imports of format %u", image.path.c_str(), header.import_format);
  }
  const size_t step = header.import_format == kPlain ? 4 : 8;
  std::vector<Import> imports(header.import_count);
  for (uint32_t i = 0; i < header.import_count; ++i) {
    const uint8_t* p = data + header.imports + i * step;
    const auto bits = read<uint32_t>(p);
    const int ordinal = static_cast<int8_t>(bits & 0xff);
    const bool weak = (bits >> 8 & 1) != 0;
    const char* name = reinterpret_cast<const char*>(data + header.symbols + (bits >> 9));
    imports[i] = {resolve(image, ordinal, name, weak),
                  header.import_format == kAddend ? read<int32_t>(p + 4) : 0};
  }
  return imports;
}

// One pointer of a chain; returns where the next is, or null.
uint8_t* fix(const Image& image, const std::vector<Import>& imports, uint16_t format, uint8_t* p) {
  const auto bits = read<uint64_t>(p);
  const uint64_t next = bits >> 51 & 0xfff;  // in units of 4 bytes
  if (bits >> 63 != 0) {
    const Import& import = imports.at(bits & 0xffffff);
    const auto address = reinterpret_cast<uint64_t>(import.address);
    write(p,
          address == 0 ? 0 : address + static_cast<uint64_t>(import.addend) + (bits >> 24 & 0xff));
  } else {
    constexpr uint16_t kOffset = 6;  // from the header; otherwise an address in the file
    const uint64_t target = bits & 0xfffffffff;
    const uint64_t address = format == kOffset ? image.first + target : target;
    write(p, reinterpret_cast<uint64_t>(image.at(address)) | (bits >> 36 & 0xff) << 56);
  }
  return next == 0 ? nullptr : p + next * 4;
}

void apply_chains(const Image& image) {
  const uint8_t* data = &image.file[image.chained_fixups.offset];
  const std::vector<Import> imports = read_imports(image, data);
  const uint8_t* starts = data + read<ChainedHeader>(data).starts;
  const auto segments = read<uint32_t>(starts);
  for (uint32_t s = 0; s < segments; ++s) {
    const auto offset = read<uint32_t>(starts + 4 + 4 * s);
    if (offset == 0) continue;
    // size (4 bytes), page size, format, offset of the segment (8), highest pointer (4), page count
    const uint8_t* in_segment = starts + offset;
    const auto page_bytes = read<uint16_t>(in_segment + 4);
    const auto format = read<uint16_t>(in_segment + 6);
    const auto segment = read<uint64_t>(in_segment + 8);
    const auto pages = read<uint16_t>(in_segment + 20);
    if (format != 2 && format != 6) fail("%s: pointers of format %u", image.path.c_str(), format);
    for (uint16_t i = 0; i < pages; ++i) {
      const auto start = read<uint16_t>(in_segment + 22 + 2 * i);
      if (start == 0xffff) continue;
      auto* p = static_cast<uint8_t*>(image.at(image.first + segment + i * page_bytes + start));
      while (p != nullptr) p = fix(image, imports, format, p);
    }
  }
}

// -- LC_DYLD_INFO.

void rebase(const Image& image) {
  const uint8_t* p = &image.file[image.rebases.offset];
  const uint8_t* end = p + image.rebases.bytes;
  auto* place = image.base;
  const auto fix = [&](uint64_t skip) {
    write(place, read<uint64_t>(place) + reinterpret_cast<uint64_t>(image.base));
    place += sizeof(uint64_t) + skip;
  };
  while (p < end) {
    const uint8_t operation = *p & 0xf0, immediate = *p & 0xf;
    ++p;
    switch (operation) {
      case 0x00:
        return;
      case 0x10:  // the kind: always a pointer
        break;
      case 0x20:
        place = static_cast<uint8_t*>(image.at(image.segments.at(immediate).address + uleb(p)));
        break;
      case 0x30:
        place += uleb(p);
        break;
      case 0x40:
        place += immediate * sizeof(uint64_t);
        break;
      case 0x50:
        for (uint8_t i = 0; i < immediate; ++i) fix(0);
        break;
      case 0x60:
        for (uint64_t i = uleb(p); i != 0; --i) fix(0);
        break;
      case 0x70:
        fix(uleb(p));
        break;
      case 0x80: {
        const uint64_t count = uleb(p), skip = uleb(p);
        for (uint64_t i = 0; i < count; ++i) fix(skip);
        break;
      }
      default:
        fail("%s: rebase operation %#x", image.path.c_str(), operation);
    }
  }
}

enum class BindKind { kEager, kWeak, kLazy };

void bind(const Image& image, Image::Range range, BindKind kind) {
  if (range.bytes == 0) return;
  const uint8_t* p = &image.file[range.offset];
  const uint8_t* end = p + range.bytes;
  auto* place = image.base;
  const char* name = "";
  int ordinal = kind == BindKind::kWeak ? kOrdinalWeak : kOrdinalSelf;
  int64_t addend = 0;
  bool weak = false;
  const auto fix = [&](uint64_t skip) {
    const auto address =
        reinterpret_cast<uint64_t>(resolve(image, ordinal, name, weak || kind == BindKind::kWeak));
    // A weak symbol that no image exports keeps its value: the image's own definition.
    if (address != 0 || kind != BindKind::kWeak) {
      write(place, address == 0 ? 0 : address + static_cast<uint64_t>(addend));
    }
    place += sizeof(uint64_t) + skip;
  };
  while (p < end) {
    const uint8_t operation = *p & 0xf0, immediate = *p & 0xf;
    ++p;
    switch (operation) {
      case 0x00:
        if (kind != BindKind::kLazy) return;  // there it only ends one symbol
        break;
      case 0x10:
        ordinal = immediate;
        break;
      case 0x20:
        ordinal = static_cast<int>(uleb(p));
        break;
      case 0x30:
        ordinal = immediate == 0 ? 0 : static_cast<int8_t>(0xf0 | immediate);
        break;
      case 0x40:
        weak = (immediate & 1) != 0;
        name = reinterpret_cast<const char*>(p);
        p += strlen(name) + 1;
        break;
      case 0x50:  // the kind: always a pointer
        break;
      case 0x60:
        addend = sleb(p);
        break;
      case 0x70:
        place = static_cast<uint8_t*>(image.at(image.segments.at(immediate).address + uleb(p)));
        break;
      case 0x80:
        place += uleb(p);
        break;
      case 0x90:
        fix(0);
        break;
      case 0xa0:
        fix(uleb(p));
        break;
      case 0xb0:
        fix(immediate * sizeof(uint64_t));
        break;
      case 0xc0: {
        const uint64_t count = uleb(p), skip = uleb(p);
        for (uint64_t i = 0; i < count; ++i) fix(skip);
        break;
      }
      default:
        fail("%s: bind operation %#x", image.path.c_str(), operation);
    }
  }
}

}  // namespace

void apply_fixups(Image& image) {
  if (image.chained_fixups.bytes != 0) {
    apply_chains(image);
    return;
  }
  if (image.rebases.bytes != 0) rebase(image);
  bind(image, image.binds, BindKind::kEager);
  bind(image, image.lazy_binds, BindKind::kLazy);
  bind(image, image.weak_binds, BindKind::kWeak);
}

}  // namespace macho
