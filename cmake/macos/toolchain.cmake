# CMake's toolchain for macOS on arm64, on any machine: the compiler is clang out of PyPI's ziglang.
#
# MLX_DIR must name the CMake files in MLX's wheel for macOS, as `make wheel-macos` does. What zig's
# own headers and libraries lack of Apple's SDK is beside this file: a few declarations that
# metal-cpp needs, the symbols of libobjc, and those of libc++ that the extension uses.

set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_OSX_SYSROOT "")

# CMake reads this file once more for each of its tests of the compiler.
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES Python_EXECUTABLE)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import ziglang; print(*ziglang.__path__)"
  OUTPUT_VARIABLE zig
  OUTPUT_STRIP_TRAILING_WHITESPACE
  COMMAND_ERROR_IS_FATAL ANY)
string(APPEND zig /zig)
set(CMAKE_CXX_COMPILER ${zig} c++)
# As an option of each command. CMake then identifies the compiler by compiling alone. Otherwise it
# would link a program, for which zig first compiles a libc++.
set(CMAKE_CXX_COMPILER_TARGET aarch64-macos.14.0)
set(CMAKE_AR ${zig})
set(CMAKE_USER_MAKE_RULES_OVERRIDE ${CMAKE_CURRENT_LIST_DIR}/rules.cmake)

# Options are read from files, since the tests compile with the same. zig's headers assume zig's own
# libc++; the annotations make them respect what the libc++ of the oldest macOS has.
file(STRINGS ${CMAKE_CURRENT_LIST_DIR}/compile_options.txt options)
string(JOIN " " CMAKE_CXX_FLAGS_INIT ${options} "-isystem ${CMAKE_CURRENT_LIST_DIR}/include")

# zig would link a libc++ of its own, whose exceptions are not of the types that libmlx throws and
# catches. So the extension refers to the system's by name (libcxx.tbd), and Python's symbols stay
# undefined until it is loaded.
file(STRINGS ${CMAKE_CURRENT_LIST_DIR}/link_options.txt options)
string(JOIN " " CMAKE_MODULE_LINKER_FLAGS_INIT ${options} "-L${CMAKE_CURRENT_LIST_DIR} -lcxx")

# A program would be linked with zig's libc++, which takes a minute to compile.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)

# What CMake would otherwise call when it installs: tools for this machine's file format.
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
set(CMAKE_STRIP "")
