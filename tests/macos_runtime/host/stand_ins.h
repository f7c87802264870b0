// Stand-ins for the system's libraries: libSystem, libobjc, the frameworks. Each source that
// implements a part of them registers its functions and variables here, by their Mach-O names.
#pragma once

#include <initializer_list>
#include <string>

namespace macho {

struct StandIn {
  const char* name;
  const void* address;
};

// Registers when the module is loaded.
struct StandIns {
  StandIns(std::initializer_list<StandIn> list);
  // Functions that glibc has under the same name, with the same types and the same meaning.
  StandIns(std::initializer_list<const char*> glibc_names);
};

// The address of a function, for a table.
template <typename F>
const void* function(F* f) {
  return reinterpret_cast<const void*>(f);
}

const void* find_stand_in(const std::string& name);

}  // namespace macho
