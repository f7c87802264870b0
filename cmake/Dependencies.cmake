# Python and threads, and functions that find the rest.
#
# Sets MLX_WELFORD_VERSION.

find_package(Threads REQUIRED)
if(CMAKE_CROSSCOMPILING AND POLICY CMP0190)
  # The interpreter is this machine's, and its headers say the same for the other one.
  cmake_policy(SET CMP0190 OLD)
endif()
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)

# Configure again when a release changes.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS pyproject.toml cmake/pins.py
                                       cmake/releases.toml)

# What cmake/pins.py answers.
function(welford_ask_pins result)
  execute_process(
    COMMAND ${Python_EXECUTABLE} cmake/pins.py ${ARGN}
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}
    OUTPUT_VARIABLE answer
    OUTPUT_STRIP_TRAILING_WHITESPACE
    COMMAND_ERROR_IS_FATAL ANY)
  set(${result} "${answer}" PARENT_SCOPE)
endfunction()

welford_ask_pins(MLX_WELFORD_VERSION version)

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

# Stops unless cmake/releases.toml names this nanobind for this MLX.
function(welford_check_release mlx nanobind)
  welford_ask_pins(expected nanobind ${mlx})
  if(NOT nanobind STREQUAL expected)
    message(
      FATAL_ERROR
        "Found nanobind ${nanobind}, but cmake/releases.toml names nanobind ${expected} for MLX ${mlx}.\n"
        "MLX's arrays reach this extension through nanobind's internal tables, which are shared only "
        "by releases with the same internals tag. With another tag the build succeeds, and every "
        "array is then refused with a TypeError.\n"
        "Install nanobind==${expected}.")
  endif()
endfunction()

# Defines the functions of the nanobind in this folder, replacing those of another. A macro, since
# what find_package sets must reach the caller.
macro(welford_find_nanobind folder)
  unset(nanobind_DIR CACHE) # of another release
  find_package(nanobind CONFIG REQUIRED PATHS ${folder} NO_DEFAULT_PATH)
  set(nanobind_library nanobind-static-${nanobind_VERSION})
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
endmacro()

# A Python module, built with the nanobind that was found last. nanobind_add_module cannot be used,
# since it has one name for the library of every nanobind.
function(welford_add_module target domain)
  nanobind_build_library(${nanobind_library} AS_SYSINCLUDE)
  nanobind_disable_stack_protector(${nanobind_library})
  # One text of nanobind's sources, of which each alone spends most of its time on the same headers.
  set_target_properties(${nanobind_library} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)

  add_library(${target} MODULE ${ARGN})
  nanobind_extension(${target})
  nanobind_link_options(${target})
  nanobind_disable_stack_protector(${target})
  nanobind_strip(${target})
  welford_compile_options(${target})
  target_compile_definitions(${target} PRIVATE NB_DOMAIN=${domain})
  target_link_libraries(${target} PRIVATE ${nanobind_library} welford_portable)
  if(APPLE AND CMAKE_CROSSCOMPILING)
    # zig makes the name of the path that it links to.
    target_link_options(${target} PRIVATE -Wl,-install_name,$<TARGET_FILE_NAME:${target}>)
  endif()
endfunction()
