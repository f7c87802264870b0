#include "gpu_link.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <deque>
#include <map>
#include <mutex>

#include "image.h"

namespace gpu {

namespace {

using macho::fail;

constexpr size_t kArenaBytes = size_t{64} << 30;
constexpr int kFresh = 0xcb, kReleased = 0xff;
// Freed memory that is not used again yet, so that late accesses to it are found.
constexpr size_t kQuarantineBytes = size_t{256} << 20;

struct Arena {
  int file;
  char* start;
  std::mutex mutex;
  size_t end = 0;                     // memory beyond this has never been used
  std::multimap<size_t, char*> free;  // by size
  std::deque<std::pair<char*, size_t>> quarantine;
  size_t quarantined = 0;

  Arena() {
    file = memfd_create("metal", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, kArenaBytes) != 0) fail("no memory for buffers");
    void* map = mmap(nullptr, kArenaBytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0);
    if (map == MAP_FAILED) fail("no address space for buffers");
    start = static_cast<char*>(map);
  }
};

Arena& arena() {
  static auto* made = new Arena;
  return *made;
}

void write_all(int to, const char* data, size_t bytes) {
  while (bytes != 0) {
    const ssize_t n = send(to, data, bytes, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail("the GPU's process is gone");
    data += n;
    bytes -= static_cast<size_t>(n);
  }
}

void read_all(int from, char* data, size_t bytes) {
  while (bytes != 0) {
    const ssize_t n = read(from, data, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail("the GPU's process is gone");
    data += n;
    bytes -= static_cast<size_t>(n);
  }
}

bool exchange(int connection, Request request, const Message& message, Reader* answer) {
  const uint64_t head[2] = {static_cast<uint64_t>(request), message.body.size()};
  write_all(connection, reinterpret_cast<const char*>(head), sizeof head);
  write_all(connection, message.body.data(), message.body.size());
  uint64_t result[2];
  read_all(connection, reinterpret_cast<char*>(result), sizeof result);
  answer->body.resize(result[1]);
  answer->place = 0;
  read_all(connection, answer->body.data(), answer->body.size());
  return result[0] == 0;
}

int connect_to_gpu() {
  const char* path = getenv("MLX_WELFORD_GPU");
  if (path == nullptr) fail("MLX_WELFORD_GPU does not say where the GPU's process listens");
  const int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  strncpy(address.sun_path, path, sizeof address.sun_path - 1);
  if (connect(connection, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    fail("nobody plays the GPU at %s", path);
  }
  Message hello;
  hello.number(static_cast<uint64_t>(getpid()));
  hello.number(static_cast<uint64_t>(arena().file));
  hello.number(kArenaBytes);
  Reader answer;
  exchange(connection, Request::kHello, hello, &answer);
  return connection;
}

std::mutex& settings_mutex() {
  static std::mutex mutex;
  return mutex;
}

std::map<std::string, std::string>& settings() {
  static std::map<std::string, std::string> table = [] {
    std::map<std::string, std::string> given;
    const char* text = getenv("MLX_WELFORD_METAL");
    std::string rest = text == nullptr ? "" : text;
    while (!rest.empty()) {
      const size_t comma = rest.find(',');
      const std::string one = rest.substr(0, comma);
      rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
      const size_t equals = one.find('=');
      given[one.substr(0, equals)] = equals == std::string::npos ? "1" : one.substr(equals + 1);
    }
    return given;
  }();
  return table;
}

size_t whole_pages(size_t bytes) {
  return bytes == 0 ? kPage : (bytes + kPage - 1) / kPage * kPage;
}

}  // namespace

Message& Message::number(uint64_t value) {
  body.append(reinterpret_cast<const char*>(&value), sizeof value);
  return *this;
}

Message& Message::bytes(std::string_view value) {
  number(value.size());
  body.append(value);
  return *this;
}

uint64_t Reader::number() {
  uint64_t value = 0;
  if (place + sizeof value > body.size()) fail("the GPU's answer is too short");
  memcpy(&value, &body[place], sizeof value);
  place += sizeof value;
  return value;
}

std::string Reader::bytes() {
  const uint64_t length = number();
  if (length > body.size() - place) fail("the GPU's answer is too short");
  place += length;
  return body.substr(place - length, length);
}

bool ask(Request request, const Message& message, Reader* answer) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  static const int connection = connect_to_gpu();
  return exchange(connection, request, message, answer);
}

void* allocate(size_t bytes) {
  Arena& a = arena();
  const size_t room = whole_pages(bytes);
  const std::lock_guard lock(a.mutex);
  char* memory;
  const auto found = a.free.find(room);
  if (found != a.free.end()) {
    memory = found->second;
    a.free.erase(found);
  } else {
    if (a.end + room > kArenaBytes) return nullptr;
    memory = a.start + a.end;
    a.end += room;
  }
  if (mprotect(memory, room, PROT_READ | PROT_WRITE) != 0) fail("no memory for a buffer");
  memset(memory, kFresh, bytes);
  return memory;
}

void give_back(void* memory, size_t bytes) {
  Arena& a = arena();
  const size_t room = whole_pages(bytes);
  auto* start = static_cast<char*>(memory);
  memset(start, kReleased, bytes);
  const std::lock_guard lock(a.mutex);
  mprotect(start, room, PROT_NONE);
  a.quarantine.emplace_back(start, room);
  a.quarantined += room;
  while (a.quarantined > kQuarantineBytes) {
    const auto [oldest, size] = a.quarantine.front();
    a.quarantine.pop_front();
    a.quarantined -= size;
    mprotect(oldest, size, PROT_READ | PROT_WRITE);
    madvise(oldest, size, MADV_REMOVE);  // gives the pages back to the system
    mprotect(oldest, size, PROT_NONE);
    a.free.emplace(size, oldest);
  }
}

uint64_t offset_of(const void* memory) {
  return static_cast<uint64_t>(static_cast<const char*>(memory) - arena().start);
}

std::string setting(const char* name) {
  const std::lock_guard lock(settings_mutex());
  const auto found = settings().find(name);
  return found == settings().end() ? "" : found->second;
}

void configure(const std::string& name, const std::string& value) {
  const std::lock_guard lock(settings_mutex());
  settings()[name] = value;
}

}  // namespace gpu
