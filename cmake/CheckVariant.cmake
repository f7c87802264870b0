# cmake -DNM=... -DISA=... -DOBJECT=... -P CheckVariant.cmake
#
# Fails if OBJECT shows the linker a symbol outside the namespace ISA, or runs code as soon as it is
# loaded.

cmake_minimum_required(VERSION 3.27)

execute_process(COMMAND ${NM} --defined-only ${OBJECT} OUTPUT_VARIABLE output
                COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" lines "${output}")

# nm prints "address kind name"; the linker sees capital kinds, and u. DW.ref.* is only a pointer.
set(strangers ${lines})
list(FILTER strangers INCLUDE REGEX " [A-Zu] ")
list(FILTER strangers EXCLUDE REGEX "${ISA}| DW\\.ref\\.")
list(FILTER lines INCLUDE REGEX "_GLOBAL__sub_I")
list(APPEND strangers ${lines})

if(strangers)
  list(JOIN strangers "\n  " strangers)
  message(
    FATAL_ERROR
      "Other code could be linked to these parts of the kernels for ${ISA}, or run them on a "
      "processor without its instructions:\n  ${strangers}\n"
      "Keep to functions that are inlined, static, or in the namespace MLX_WELFORD_ISA.")
endif()
