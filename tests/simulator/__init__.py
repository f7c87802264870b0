"""Runs Metal kernels on the CPU, thread by thread, and finds what they do wrong.

For tests only. `loader` compiles and runs, `source` prepares Metal source for clang,
``include/metal_stdlib`` stands in for Metal's library, ``executor.cpp`` runs the threads.
"""

from .loader import CompileError, Library, SimulatorError, Traffic, compile_library

__all__ = ["CompileError", "Library", "SimulatorError", "Traffic", "compile_library"]
