# Where zig's commands differ from what CMake does on a Mac.

# dlopen takes a shared library as it takes a bundle, which zig does not write.
set(CMAKE_SHARED_MODULE_CREATE_CXX_FLAGS -shared)
# Begun anew: ar would keep objects that are no longer part of the library.
set(CMAKE_CXX_CREATE_STATIC_LIBRARY "<CMAKE_COMMAND> -E rm -f <TARGET>"
                                    "<CMAKE_AR> ar rcsD <TARGET> <OBJECTS>")
