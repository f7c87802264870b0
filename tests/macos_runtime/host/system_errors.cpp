#include "system_errors.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "stand_ins.h"

namespace macho {

int darwin_error(int linux_error) {
  switch (linux_error) {
    case EDEADLK:
      return 11;
    case EAGAIN:
      return 35;
    case EINPROGRESS:
      return 36;
    case ENOTSUP:
      return 45;
    case EADDRINUSE:
      return 48;
    case ETIMEDOUT:
      return 60;
    case ECONNREFUSED:
      return 61;
    case ELOOP:
      return 62;
    case ENAMETOOLONG:
      return 63;
    case ENOTEMPTY:
      return 66;
    case ENOSYS:
      return 78;
    case EOVERFLOW:
      return 84;
    case EILSEQ:
      return 92;
    default:
      return linux_error;
  }
}

namespace {

// Code for macOS reads and sets errno through this pointer; what glibc set meanwhile is taken over.
int* error_location() {
  static thread_local int value;
  if (errno != 0) value = darwin_error(errno);
  errno = 0;
  return &value;
}

int error_text(int error, char* text, size_t bytes) {
  snprintf(text, bytes, "error %d", error);
  return 0;
}

const StandIns kErrors{
    {"___error", function(error_location)},
    {"_strerror_r", function(error_text)},
};

}  // namespace

}  // namespace macho
