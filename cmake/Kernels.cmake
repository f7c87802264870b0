# The CPU kernels, compiled for each instruction set; the program chooses when it runs. Each element
# type is an object of its own, so that they are compiled side by side.

include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)

set(kernel_elements float32 float16 bfloat16)

# Adds `source` to `target`, on x86-64 for three instruction sets. MLX_WELFORD_ISA is the namespace
# of each, MLX_WELFORD_ELEMENT the name of the type.
function(welford_add_kernels target source)
  welford_add_variant(${target} ${source} baseline)

  # The compiler is asked, not the host: they differ when cross-compiling.
  check_cxx_source_compiles(
    "#if !defined(__x86_64__)\n#error\n#endif\nint main() { return 0; }" MLX_WELFORD_ON_X86_64)
  if(NOT MLX_WELFORD_ON_X86_64)
    return()
  endif()

  check_cxx_compiler_flag(-march=x86-64-v4 MLX_WELFORD_HAS_LEVELS)
  if(NOT MLX_WELFORD_HAS_LEVELS)
    message(
      FATAL_ERROR "The compiler has no -march=x86-64-v4: GCC 11 or Clang 12 is needed, or newer.")
  endif()
  # AVX-512 code uses half of its registers' width otherwise.
  check_cxx_compiler_flag(-mprefer-vector-width=512 MLX_WELFORD_HAS_VECTOR_WIDTH)
  if(MLX_WELFORD_HAS_VECTOR_WIDTH)
    set(v4_options -mprefer-vector-width=512)
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
    # GCC 12 warns of its own AVX-512 intrinsics (GCC bug 105593).
    list(APPEND v4_options -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  welford_add_variant(${target} ${source} x86_64_v3 -march=x86-64-v3)
  welford_add_variant(${target} ${source} x86_64_v4 -march=x86-64-v4 ${v4_options})
  welford_check_variants(${target} x86_64_v3 x86_64_v4)
endfunction()

# Compiles `source` for the instruction set `isa` with the given options.
function(welford_add_variant target source isa)
  foreach(element IN LISTS kernel_elements)
    set(kernels kernels_${isa}_${element})
    add_library(${kernels} OBJECT ${source})
    welford_compile_options(${kernels})
    target_compile_definitions(${kernels} PRIVATE MLX_WELFORD_ISA=${isa}
                                                  MLX_WELFORD_ELEMENT=${element})
    # Not -ffast-math: NaN and infinity are ordinary values here. And the sources say where a
    # product and a sum are rounded once: a compiler would decide it for each loop anew.
    target_compile_options(
      ${kernels} PRIVATE $<$<NOT:$<CONFIG:Debug>>:-O3> -fno-math-errno -fno-trapping-math
                         -ffp-contract=off ${ARGN})
    target_link_libraries(${target} PRIVATE ${kernels})
  endforeach()
endfunction()

# Of an inline function that several objects define, the linker keeps one copy. Were that the
# AVX-512 copy of, say, a member of std::map, all its callers would crash on an older processor. So
# all that a variant shows to the linker must lie in the variant's namespace.
function(welford_check_variants target)
  # Without optimisation nothing is inlined, and the build is for this machine only.
  if(NOT CMAKE_NM OR CMAKE_BUILD_TYPE STREQUAL Debug)
    return()
  endif()
  set(script ${CMAKE_CURRENT_SOURCE_DIR}/cmake/CheckVariant.cmake)
  foreach(isa IN LISTS ARGN)
    foreach(element IN LISTS kernel_elements)
      set(kernels kernels_${isa}_${element})
      set(stamp ${CMAKE_CURRENT_BINARY_DIR}/${kernels}.checked)
      add_custom_command(
        OUTPUT ${stamp}
        COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} -DISA=${isa}
                -DOBJECT=$<TARGET_OBJECTS:${kernels}> -P ${script}
        COMMAND ${CMAKE_COMMAND} -E touch ${stamp}
        DEPENDS $<TARGET_OBJECTS:${kernels}> ${script}
        COMMENT "Checking that the ${element} kernels for ${isa} keep to themselves"
        VERBATIM)
      add_custom_target(check_${kernels} DEPENDS ${stamp})
      add_dependencies(${target} check_${kernels})
    endforeach()
  endforeach()
endfunction()
