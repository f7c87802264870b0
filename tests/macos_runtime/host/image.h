// Mach-O images in a Linux process on arm64: mapped, bound and initialised as dyld does on macOS.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace macho {

// The library that an import is looked for in: one of the image's, counted from 1, or one of these.
constexpr int kOrdinalSelf = 0;
constexpr int kOrdinalMain = -1;  // the program: CPython
constexpr int kOrdinalFlat = -2;  // whichever image has it
constexpr int kOrdinalWeak = -3;  // one definition for all images: C++'s inline functions, say

struct Section {
  std::string segment;
  std::string name;
  uint64_t address;
  uint64_t bytes;
  uint32_t type;
};

struct Segment {
  std::string name;
  uint64_t address;
  uint64_t bytes;
  uint64_t file_offset;
  uint64_t file_bytes;
  int protection;
  bool read_only_after_fixups;
};

struct Export {
  uint64_t address;
  bool weak;
};

// Addresses in the file count from `base`.
struct Image {
  std::string path;
  std::string install_name;
  std::vector<uint8_t> file;
  uint8_t* base = nullptr;
  uint64_t first = 0;  // the lowest address, where the header is
  uint64_t end = 0;
  std::vector<Segment> segments;
  std::vector<Section> sections;
  std::vector<std::string> rpaths;
  std::vector<std::string> library_names;
  std::vector<Image*> libraries;  // null: a library of the system, played by the stand-ins
  std::unordered_map<std::string, Export> exports;
  std::vector<std::pair<uint64_t, std::string>> symbols;  // sorted by address, for reports

  // Places in the file, from the load commands.
  struct Range {
    uint32_t offset = 0;
    uint32_t bytes = 0;
  };
  Range chained_fixups, rebases, binds, weak_binds, lazy_binds, export_trie;

  // Thread-local variables: the initial bytes, and the block of each thread.
  uint64_t thread_locals = 0;
  uint64_t thread_local_data = 0;
  uint64_t thread_local_bytes = 0;
  pthread_key_t thread_local_key = 0;

  const Section* section(const char* name) const;
  void* at(uint64_t address) const { return base + address; }
};

// The image at `path`, with whatever it depends on. Loaded once; ends the process with a report
// when that is not possible.
Image& load(const std::string& path);

// The value of an exported symbol, with its leading underscore, or null.
void* exported(const Image& image, const std::string& name);

// The same in any image; strong definitions are preferred to weak ones.
void* exported_anywhere(const std::string& name);

// The image that an address lies in, or null.
Image* image_of(const void* address);

// Describes an address for reports: "libmlx.dylib mlx::core::eval+16".
std::string describe(const void* address);

// Prints the message and the callers, and ends the process: the program under test must not handle
// mistakes of this kind.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// -- Shared by the parts of the loader.

const std::vector<Image*>& images();
void apply_fixups(Image& image);
void prepare_thread_locals(Image& image);
void finish_thread_locals(const Image& image);
// The address of an import. Null for a weak import that is defined nowhere.
void* resolve(const Image& image, int ordinal, const std::string& name, bool weak);

}  // namespace macho
