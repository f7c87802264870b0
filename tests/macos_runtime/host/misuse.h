// Programs that use Metal wrongly, each in one way, by sending it messages as metal-cpp does.
#pragma once

#include <string>

namespace metal {

// Runs one and returns the error of its command buffer, empty if there is none. "nothing" does
// everything rightly. An unknown name is answered with "?".
std::string misuse(const std::string& what);

}  // namespace metal
