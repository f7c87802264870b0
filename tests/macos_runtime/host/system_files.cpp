// Files and memory: functions whose flags or structures differ on Darwin.

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "stand_ins.h"
#include "variadic.h"

namespace macho {

extern "C" {

// Darwin's flags, and the mode as the variadic argument.
__attribute__((used)) int macho_open(const char* path, int flags, void* stack) {
  constexpr struct {
    int darwin, here;
  } kFlags[] = {{0x8, O_APPEND}, {0x200, O_CREAT},        {0x400, O_TRUNC},
                {0x800, O_EXCL}, {0x100000, O_DIRECTORY}, {0x1000000, O_CLOEXEC}};
  int here = flags & O_ACCMODE;
  for (const auto& flag : kFlags) {
    if ((flags & flag.darwin) != 0) here |= flag.here;
  }
  va_list arguments;
  read_arguments(&arguments, stack);
  return open(path, here, va_arg(arguments, int));
}

// MLX only gives hints to the file system (F_NOCACHE, F_RDAHEAD).
__attribute__((used)) int macho_fcntl(int, int command, void*) {
  constexpr int kReadAhead = 45, kNoCache = 48;
  if (command == kReadAhead || command == kNoCache) return 0;
  errno = EINVAL;
  return -1;
}

}  // extern "C"

VARIADIC(macho_variadic_open, 2, macho_open);
VARIADIC(macho_variadic_fcntl, 2, macho_fcntl);

namespace {

struct DarwinStat {
  int32_t device;
  uint16_t mode, links;
  uint64_t inode;
  uint32_t user, group;
  int32_t special_device;
  timespec accessed, modified, changed, born;
  int64_t size, blocks;
  int32_t block_size;
  uint32_t flags, generation;
  int32_t spare;
  int64_t more_spare[2];
};
static_assert(sizeof(DarwinStat) == 144);

int convert(int result, const struct stat& s, DarwinStat* out) {
  if (result != 0) return result;
  *out = {};
  out->device = static_cast<int32_t>(s.st_dev);
  out->mode = static_cast<uint16_t>(s.st_mode);
  out->links = static_cast<uint16_t>(s.st_nlink);
  out->inode = s.st_ino;
  out->user = s.st_uid;
  out->group = s.st_gid;
  out->accessed = s.st_atim;
  out->modified = s.st_mtim;
  out->changed = s.st_ctim;
  out->size = s.st_size;
  out->blocks = s.st_blocks;
  out->block_size = s.st_blksize;
  return 0;
}

int darwin_stat(const char* path, DarwinStat* out) {
  struct stat s{};
  return convert(stat(path, &s), s, out);
}

int darwin_lstat(const char* path, DarwinStat* out) {
  struct stat s{};
  return convert(lstat(path, &s), s, out);
}

int darwin_fstat(int file, DarwinStat* out) {
  struct stat s{};
  return convert(fstat(file, &s), s, out);
}

void* darwin_mmap(void* address, size_t bytes, int protection, int flags, int file, off_t offset) {
  constexpr int kAnonymous = 0x1000;
  int here = flags & (MAP_SHARED | MAP_PRIVATE | MAP_FIXED);  // the same bits
  if ((flags & kAnonymous) != 0) here |= MAP_ANONYMOUS;
  return mmap(address, bytes, protection, here, file, offset);
}

// Pointers to glibc's streams: callers only pass them on.
FILE* streams[3];

const StandIns kFiles{
    {"_open", function(macho_variadic_open)},
    {"_fcntl", function(macho_variadic_fcntl)},
    {"_stat", function(darwin_stat)},
    {"_lstat", function(darwin_lstat)},
    {"_fstat", function(darwin_fstat)},
    {"_mmap", function(darwin_mmap)},
    {"___stdinp", &streams[0]},
    {"___stdoutp", &streams[1]},
    {"___stderrp", &streams[2]},
};

const StandIns kSame{
    "access",   "chdir",  "close",     "closedir", "fchmod", "fclose", "fflush", "fgets",
    "fileno",   "fopen",  "fputc",     "fputs",    "fputwc", "fread",  "fseek",  "fseeko",
    "ftell",    "ftello", "ftruncate", "fwrite",   "getc",   "getcwd", "getwc",  "isatty",
    "link",     "lseek",  "mkdir",     "munmap",   "pclose", "popen",  "pread",  "putchar",
    "puts",     "read",   "readlink",  "remove",   "rename", "rewind", "setbuf", "symlink",
    "truncate", "ungetc", "ungetwc",   "unlink",   "write",
};

const bool kOpened = [] {
  streams[0] = stdin;
  streams[1] = stdout;
  streams[2] = stderr;
  return true;
}();

}  // namespace

}  // namespace macho
