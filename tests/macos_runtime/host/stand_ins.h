// What plays the libraries of the system: libSystem, libobjc, the frameworks. Each source that
// plays a part of them registers its functions and variables here, under their names in Mach-O.
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

// The address of a function, as a table wants it.
template <typename F>
const void* function(F* f) {
  return reinterpret_cast<const void*>(f);
}

const void* find_stand_in(const std::string& name);

}  // namespace macho
