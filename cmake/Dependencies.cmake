# Python, MLX, nanobind and threads; stops unless MLX and nanobind are the releases that
# pyproject.toml pins.
#
# Sets MLX_WELFORD_VERSION and MLX_WELFORD_MLX_VERSION.

find_package(Threads REQUIRED)
if(CMAKE_CROSSCOMPILING AND POLICY CMP0190)
  # The interpreter is this machine's, and its headers say the same for the other one.
  cmake_policy(SET CMP0190 OLD)
endif()
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)

# Configure again when a pin changes.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS pyproject.toml cmake/pins.py)

# What cmake/pins.py answers.
function(welford_ask_pins result)
  execute_process(
    COMMAND ${Python_EXECUTABLE} cmake/pins.py ${ARGN}
    WORKING_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}
    OUTPUT_VARIABLE answer
    OUTPUT_STRIP_TRAILING_WHITESPACE
    COMMAND_ERROR_IS_FATAL ANY)
  set(${result} "${answer}" PARENT_SCOPE)
endfunction()

# Where Python would import a package from, without importing it: mlx loads only if libmlx does.
function(welford_find_python_package result name)
  execute_process(
    COMMAND
      ${Python_EXECUTABLE} -c
      "from importlib.util import find_spec
spec = find_spec('${name}')
print(*(spec.submodule_search_locations if spec else []), sep=';')"
    OUTPUT_VARIABLE folders
    OUTPUT_STRIP_TRAILING_WHITESPACE
    COMMAND_ERROR_IS_FATAL ANY)
  set(${result} "${folders}" PARENT_SCOPE)
endfunction()

welford_ask_pins(MLX_WELFORD_VERSION version)
welford_ask_pins(MLX_WELFORD_MLX_VERSION pin mlx)
welford_ask_pins(nanobind_pin pin nanobind)

welford_find_python_package(mlx_folders mlx)
find_package(MLX CONFIG QUIET PATHS ${mlx_folders} NO_DEFAULT_PATH)
if(NOT MLX_FOUND)
  message(
    FATAL_ERROR
      "MLX's C++ library was not found for ${Python_EXECUTABLE}.\n"
      "Install the release that pyproject.toml pins:\n"
      "  macOS:  pip install mlx==${MLX_WELFORD_MLX_VERSION}\n"
      "  Linux:  pip install mlx==${MLX_WELFORD_MLX_VERSION} mlx-cpu==${MLX_WELFORD_MLX_VERSION}\n"
      "(On Linux mlx alone has neither headers nor library.)")
endif()
if(NOT MLX_VERSION STREQUAL MLX_WELFORD_MLX_VERSION)
  message(
    FATAL_ERROR
      "Found MLX ${MLX_VERSION} in ${MLX_DIR}, but pyproject.toml pins "
      "mlx==${MLX_WELFORD_MLX_VERSION}.\n"
      "The layout of MLX's C++ classes changes between releases, and libmlx carries no version in "
      "its name: an extension runs safely only with the exact release that it was built against.\n"
      "Install mlx==${MLX_WELFORD_MLX_VERSION} (and mlx-cpu==${MLX_WELFORD_MLX_VERSION} on Linux), "
      "or change every pin of MLX in [build-system].requires and run the tests.")
endif()

welford_find_python_package(nanobind_folders nanobind)
find_package(nanobind CONFIG QUIET PATHS ${nanobind_folders} NO_DEFAULT_PATH)
if(NOT nanobind_FOUND)
  message(FATAL_ERROR "nanobind was not found for ${Python_EXECUTABLE}:\n"
                      "  pip install nanobind==${nanobind_pin}")
endif()
if(NOT nanobind_VERSION STREQUAL nanobind_pin)
  message(
    FATAL_ERROR
      "Found nanobind ${nanobind_VERSION} in ${nanobind_DIR}, but pyproject.toml pins "
      "nanobind==${nanobind_pin}.\n"
      "MLX's arrays reach this extension through nanobind's internal tables, which are shared only "
      "by releases with the same internals tag. nanobind ${nanobind_pin} has the tag that MLX "
      "${MLX_WELFORD_MLX_VERSION} was built with; with another the build succeeds, and every array "
      "is then refused with a TypeError.\n"
      "Install nanobind==${nanobind_pin}.")
endif()

message(STATUS "MLX ${MLX_VERSION} in ${MLX_DIR}")
message(STATUS "nanobind ${nanobind_VERSION} in ${nanobind_DIR}")

if(APPLE)
  # MLX's wheel for macOS names frameworks by their path in the Xcode that it was built with. They
  # are libmlx's affair: metal-cpp needs only the Objective-C runtime.
  set_target_properties(mlx PROPERTIES INTERFACE_LINK_LIBRARIES objc)
endif()
if(APPLE AND CMAKE_CROSSCOMPILING)
  # nanobind names Python's symbols to Apple's linker in a file that zig's does not read: the
  # toolchain lets any symbol be undefined. And nanobind has local symbols left out (-x), after
  # which the indices that zig's linker writes point outside its symbol table.
  function(nanobind_link_options)
  endfunction()
  function(nanobind_strip name)
    target_link_options(${name} PRIVATE -Wl,-dead_strip -Wl,-S)
  endfunction()
endif()
