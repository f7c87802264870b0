// The connection to the process that plays the GPU (../gpu.py), and the memory that both see.
//
// Buffers lie in one sparse file without a name, which the other process maps as well: like a GPU
// it sees the buffers and nothing else of this process, and each command names those it may touch.
// Requests are answered in turn; each is a kind, a length and a body, packed as Message does.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>
#include <string_view>

namespace gpu {

// A body: numbers of 8 bytes, and texts or bytes with their length in front.
struct Message {
  std::string body;

  Message& number(uint64_t value);
  Message& bytes(std::string_view value);
};

// Reads what Message wrote.
struct Reader {
  std::string body;
  size_t place = 0;

  uint64_t number();
  std::string bytes();
};

enum class Request : uint64_t {
  kHello = 0,     // process, file descriptor of the memory, its bytes
  kLibrary = 1,   // source -> library, names of its functions
  kPipeline = 2,  // library or 0 and the path of a file, function, function constants -> pipeline
  kExecute = 3,   // a command buffer -> nothing
};

// Sends a request and waits for the answer. False: the answer is one text that says what went
// wrong.
bool ask(Request request, const Message& message, Reader* answer);

// Memory for a buffer, at the start of one of macOS's pages, filled with a pattern that makes NaN
// of every type. Freed memory is filled with another pattern, and is not accessible for some time.
constexpr size_t kPage = 0x4000;
void* allocate(size_t bytes);
void give_back(void* memory, size_t bytes);
uint64_t offset_of(const void* memory);

// A setting of the stand-in: given in MLX_WELFORD_METAL, as name=value,name=value, or by
// configure().
std::string setting(const char* name);
void configure(const std::string& name, const std::string& value);

}  // namespace gpu
