# CMake's toolchain for Linux on arm64, with the cross compiler that Debian packages. Not zig: it
# has libc++ alone, and MLX for Linux is built with libstdc++.
#
# MLX_DIR must name the CMake files in MLX's wheel for it, as `make wheel-aarch64` does.

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
