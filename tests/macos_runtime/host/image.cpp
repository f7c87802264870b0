// Reads a Mach-O file, maps it, loads what it depends on and runs its initialisers.

#include "image.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

namespace macho {

namespace {

// As in <mach-o/loader.h>.
struct Header {
  uint32_t magic, cpu, cpu_subtype, type, command_count, command_bytes, flags, reserved;
};
struct Command {
  uint32_t command, bytes;
};
struct SegmentCommand {
  uint32_t command, bytes;
  char name[16];
  uint64_t address, size, file_offset, file_size;
  uint32_t max_protection, protection, section_count, flags;
};
struct SectionHeader {
  char name[16], segment[16];
  uint64_t address, size;
  uint32_t offset, align, relocations, relocation_count, flags, reserved[3];
};
struct SymbolTableCommand {
  uint32_t command, bytes, symbols, count, strings, string_bytes;
};
struct Symbol {
  uint32_t name;
  uint8_t type, section;
  uint16_t description;
  uint64_t value;
};
struct DataCommand {
  uint32_t command, bytes, offset, size;
};
struct StringCommand {
  uint32_t command, bytes, offset;
};
struct DyldInfoCommand {
  uint32_t command, bytes;
  Image::Range rebase, bind, weak_bind, lazy_bind, exports;
};

enum : uint32_t {
  kMagic = 0xfeedfacf,
  kArm64 = 0x0100000c,
  kRequired = 0x80000000,
  kSegment = 0x19,
  kSymbolTable = 0x2,
  kLoadLibrary = 0xc,
  kInstallName = 0xd,
  kLoadWeakLibrary = 0x18 | kRequired,
  kReexportLibrary = 0x1f | kRequired,
  kRpath = 0x1c | kRequired,
  kDyldInfo = 0x22,
  kDyldInfoOnly = 0x22 | kRequired,
  kExportsTrie = 0x33 | kRequired,
  kChainedFixups = 0x34 | kRequired,

  kReadOnlyAfterFixups = 0x10,
  kInitialiserPointers = 0x9,
  kInitialiserOffsets = 0x16,
};

// Segments begin at multiples of macOS's page on arm64, which is four of Linux's.
constexpr uint64_t kPage = 0x4000;

std::string fixed(const char (&name)[16]) { return {name, strnlen(name, sizeof name)}; }

uint64_t uleb(const uint8_t*& p) {
  uint64_t value = 0;
  for (int shift = 0;; shift += 7) {
    value |= uint64_t{*p & 0x7fu} << shift;
    if ((*p++ & 0x80) == 0) return value;
  }
}

// The exports are a trie: an edge holds a part of the name, a node where the symbol is.
void read_exports(Image& image, const uint8_t* trie, uint64_t node, std::string& name) {
  const uint8_t* p = trie + node;
  const uint64_t bytes = uleb(p);
  const uint8_t* children = p + bytes;
  if (bytes != 0) {
    const uint64_t flags = uleb(p);
    constexpr uint64_t kWeak = 0x4, kReexport = 0x8, kResolver = 0x10;
    if ((flags & (kReexport | kResolver)) == 0) {
      image.exports[name] = {image.first + uleb(p), (flags & kWeak) != 0};
    }
  }
  const size_t length = name.size();
  for (uint8_t left = *children++; left != 0; --left) {
    const char* edge = reinterpret_cast<const char*>(children);
    name += edge;
    children += strlen(edge) + 1;
    read_exports(image, trie, uleb(children), name);
    name.resize(length);
  }
}

void read_symbols(Image& image, const SymbolTableCommand& table) {
  constexpr uint8_t kDebugging = 0xe0, kKind = 0xe, kInSection = 0xe;
  const auto* symbols = reinterpret_cast<const Symbol*>(&image.file[table.symbols]);
  const auto* strings = reinterpret_cast<const char*>(&image.file[table.strings]);
  for (uint32_t i = 0; i < table.count; ++i) {
    if ((symbols[i].type & kDebugging) == 0 && (symbols[i].type & kKind) == kInSection) {
      image.symbols.emplace_back(symbols[i].value, strings + symbols[i].name);
    }
  }
  std::sort(image.symbols.begin(), image.symbols.end());
}

void read_segment(Image& image, const SegmentCommand& command) {
  image.segments.push_back({fixed(command.name), command.address, command.size, command.file_offset,
                            command.file_size, static_cast<int>(command.protection),
                            (command.flags & kReadOnlyAfterFixups) != 0});
  const auto* section = reinterpret_cast<const SectionHeader*>(&command + 1);
  for (uint32_t i = 0; i < command.section_count; ++i, ++section) {
    image.sections.push_back({fixed(section->segment), fixed(section->name), section->address,
                              section->size, section->flags & 0xff});
  }
}

void read_commands(Image& image) {
  const auto* header = reinterpret_cast<const Header*>(image.file.data());
  if (image.file.size() < sizeof *header || header->magic != kMagic || header->cpu != kArm64) {
    fail("%s is not a Mach-O file for arm64", image.path.c_str());
  }
  const uint8_t* p = image.file.data() + sizeof *header;
  for (uint32_t i = 0; i < header->command_count; ++i) {
    const auto* command = reinterpret_cast<const Command*>(p);
    const auto text = [p] {
      return std::string(reinterpret_cast<const char*>(p) +
                         reinterpret_cast<const StringCommand*>(p)->offset);
    };
    const auto* data = reinterpret_cast<const DataCommand*>(p);
    switch (command->command) {
      case kSegment:
        read_segment(image, *reinterpret_cast<const SegmentCommand*>(p));
        break;
      case kSymbolTable:
        read_symbols(image, *reinterpret_cast<const SymbolTableCommand*>(p));
        break;
      case kInstallName:
        image.install_name = text();
        break;
      case kLoadLibrary:
      case kLoadWeakLibrary:
      case kReexportLibrary:
        image.library_names.push_back(text());
        break;
      case kRpath:
        image.rpaths.push_back(text());
        break;
      case kChainedFixups:
        image.chained_fixups = {data->offset, data->size};
        break;
      case kExportsTrie:
        image.export_trie = {data->offset, data->size};
        break;
      case kDyldInfo:
      case kDyldInfoOnly: {
        const auto* info = reinterpret_cast<const DyldInfoCommand*>(p);
        image.rebases = info->rebase;
        image.binds = info->bind;
        image.weak_binds = info->weak_bind;
        image.lazy_binds = info->lazy_bind;
        image.export_trie = info->exports;
        break;
      }
      default:
        break;
    }
    p += command->bytes;
  }
}

void read_file(Image& image) {
  const int file = open(image.path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (file < 0 || fstat(file, &status) != 0) fail("cannot open %s", image.path.c_str());
  image.file.resize(static_cast<size_t>(status.st_size));
  size_t have = 0;
  while (have < image.file.size()) {
    const ssize_t n = read(file, &image.file[have], image.file.size() - have);
    if (n <= 0) fail("cannot read %s", image.path.c_str());
    have += static_cast<size_t>(n);
  }
  close(file);
}

void map(Image& image) {
  image.first = UINT64_MAX;
  for (const Segment& s : image.segments) {
    if (s.bytes == 0) continue;
    image.first = std::min(image.first, s.address);
    image.end = std::max(image.end, s.address + s.bytes);
  }
  const size_t bytes = image.end - image.first;
  void* room = mmap(nullptr, bytes + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) fail("no memory for %s", image.path.c_str());
  const auto start = (reinterpret_cast<uintptr_t>(room) + kPage - 1) & ~(kPage - 1);
  image.base = reinterpret_cast<uint8_t*>(start - image.first);
  for (const Segment& s : image.segments) {
    if (s.bytes == 0) continue;
    mprotect(image.at(s.address), s.bytes, PROT_READ | PROT_WRITE);
    memcpy(image.at(s.address), &image.file[s.file_offset], s.file_bytes);
  }
}

void protect(const Image& image) {
  for (const Segment& s : image.segments) {
    if (s.bytes == 0) continue;
    int protection = s.protection;  // the bits are POSIX's
    if (s.read_only_after_fixups) protection &= ~PROT_WRITE;
    mprotect(image.at(s.address), s.bytes, protection);
    if ((protection & PROT_EXEC) != 0) {
      char* code = static_cast<char*>(image.at(s.address));
      __builtin___clear_cache(code, code + s.bytes);
    }
  }
}

bool is_file(const std::string& path) {
  struct stat status{};
  return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

// System libraries are not files: nor are they on macOS, where dyld's cache holds them.
bool is_of_system(const std::string& name) {
  return name.starts_with("/usr/lib/") || name.starts_with("/System/Library/");
}

std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

std::vector<Image*> loaded;

// The images whose libraries are being loaded, each asked for by the one before it.
std::vector<const Image*> loading;

// The file that a library's name stands for, found as dyld does: @rpath is each LC_RPATH of the
// image that asks, then of the one that asked for that, and so on; @loader_path is the folder of
// the image that says it.
std::string find_library(const std::string& name) {
  constexpr const char* kRpathPrefix = "@rpath/";
  constexpr const char* kLoaderPrefix = "@loader_path/";
  const auto beside = [&](const Image& image, const std::string& path) {
    return path.starts_with(kLoaderPrefix)
               ? folder_of(image.path) + "/" + path.substr(strlen(kLoaderPrefix))
               : path;
  };
  if (!name.starts_with(kRpathPrefix)) return beside(*loading.back(), name);
  for (auto image = loading.rbegin(); image != loading.rend(); ++image) {
    for (const std::string& rpath : (*image)->rpaths) {
      const std::string path = beside(
          **image, rpath + (rpath.ends_with('/') ? "" : "/") + name.substr(strlen(kRpathPrefix)));
      if (is_file(path)) return path;
    }
  }
  return "";
}

void load_libraries(Image& image) {
  loading.push_back(&image);
  for (const std::string& name : image.library_names) {
    Image* found = nullptr;
    for (Image* other : loaded) {
      if (other->install_name == name && is_of_system(name)) found = other;
    }
    if (found == nullptr && !is_of_system(name)) {
      const std::string path = find_library(name);
      if (!is_file(path)) fail("%s: no library %s", image.path.c_str(), name.c_str());
      found = &load(path);
    }
    image.libraries.push_back(found);
  }
  loading.pop_back();
}

void initialise(const Image& image) {
  static char* arguments[] = {const_cast<char*>("python"), nullptr};
  using Initialiser = void (*)(int, char**, char**, char**);
  const auto run = [](Initialiser f) { f(1, arguments, environ, environ); };
  for (const Section& s : image.sections) {
    const auto* place = static_cast<const uint8_t*>(image.at(s.address));
    if (s.type == kInitialiserOffsets) {
      for (uint64_t i = 0; i < s.bytes; i += sizeof(uint32_t)) {
        uint32_t offset;
        memcpy(&offset, place + i, sizeof offset);
        run(reinterpret_cast<Initialiser>(image.at(image.first + offset)));
      }
    } else if (s.type == kInitialiserPointers) {
      for (uint64_t i = 0; i < s.bytes; i += sizeof(Initialiser)) {
        Initialiser f;
        memcpy(&f, place + i, sizeof f);
        run(f);
      }
    }
  }
}

void print_callers() {
  auto frame = static_cast<void**>(__builtin_frame_address(0));
  for (int i = 0; i < 40 && frame != nullptr; ++i) {
    fprintf(stderr, "    %s\n", describe(frame[1]).c_str());
    auto next = static_cast<void**>(frame[0]);
    if (next <= frame) break;
    frame = next;
  }
}

}  // namespace

const Section* Image::section(const char* wanted) const {
  for (const Section& s : sections) {
    if (s.name == wanted) return &s;
  }
  return nullptr;
}

const std::vector<Image*>& images() { return loaded; }

Image& load(const std::string& path) {
  char* real = realpath(path.c_str(), nullptr);
  if (real == nullptr) fail("there is no %s", path.c_str());
  const std::string name = real;
  free(real);
  for (Image* image : loaded) {
    if (image->path == name) return *image;
  }
  auto* image = new Image;  // never freed: nothing is unloaded
  image->path = name;
  read_file(*image);
  read_commands(*image);
  map(*image);
  std::string symbol;
  if (image->export_trie.bytes != 0) {
    read_exports(*image, &image->file[image->export_trie.offset], 0, symbol);
  }
  load_libraries(*image);
  loaded.push_back(image);
  prepare_thread_locals(*image);
  apply_fixups(*image);
  finish_thread_locals(*image);
  protect(*image);
  initialise(*image);
  image->file = {};
  return *image;
}

void* exported(const Image& image, const std::string& name) {
  const auto found = image.exports.find(name);
  return found == image.exports.end() ? nullptr : image.at(found->second.address);
}

void* exported_anywhere(const std::string& name) {
  void* weak = nullptr;
  for (const Image* image : loaded) {
    const auto found = image->exports.find(name);
    if (found == image->exports.end()) continue;
    void* address = image->at(found->second.address);
    if (!found->second.weak) return address;
    if (weak == nullptr) weak = address;
  }
  return weak;
}

Image* image_of(const void* address) {
  const auto* p = static_cast<const uint8_t*>(address);
  for (Image* image : loaded) {
    if (p >= image->base + image->first && p < image->base + image->end) return image;
  }
  return nullptr;
}

std::string describe(const void* address) {
  char text[64];
  if (const Image* image = image_of(address)) {
    const auto offset = static_cast<uint64_t>(static_cast<const uint8_t*>(address) - image->base);
    std::string result = image->path.substr(image->path.rfind('/') + 1);
    const auto next =
        std::upper_bound(image->symbols.begin(), image->symbols.end(), offset,
                         [](uint64_t value, const auto& symbol) { return value < symbol.first; });
    if (next == image->symbols.begin()) {
      snprintf(text, sizeof text, " %#lx", offset);
      return result + text;
    }
    snprintf(text, sizeof text, "+%lu", offset - std::prev(next)->first);
    return result + " " + std::prev(next)->second + text;
  }
  Dl_info info{};
  if (dladdr(address, &info) != 0 && info.dli_sname != nullptr) return info.dli_sname;
  snprintf(text, sizeof text, "%p", address);
  return text;
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "\nmacOS runtime: ");
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fprintf(stderr, "\n");
  print_callers();
  fflush(stderr);
  _exit(86);
}

}  // namespace macho
