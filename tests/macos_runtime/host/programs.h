// Small Metal programs for tests, which send messages as metal-cpp does.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace metal {

// Uses Metal wrongly in one way, and returns the error of the command buffer, empty if there is
// none. "nothing" does everything rightly. An unknown name is answered with "?".
std::string misuse(const std::string& what);

// Runs one kernel of a library made from source as two pipelines, with these values of its function
// constants and with their negatives. Returns what each writes, factor * i + added for i < 64.
std::vector<float> specialized(int32_t added, float factor);

}  // namespace metal
