"""The shaders on an NVIDIA GPU, a proxy for Apple's: both run 32 lanes in lockstep.

For tests and measurements only. `source` makes CUDA C++ of Metal source, ``include/metal_stdlib``
stands in for Metal's library, `compiler` compiles with NVRTC, which needs no GPU, `device` runs
launch plans, which does. README.md says how to use it, and what has not been run.
"""
