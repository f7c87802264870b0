"""Runs a script with the CPU as MLX's default device, which on a Mac is the GPU otherwise.

python on_cpu.py SCRIPT ARGUMENTS...
"""

import runpy
import sys
from pathlib import Path

import mlx.core as mx

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    mx.set_default_device(mx.cpu)
    runpy.run_path(sys.argv[0], run_name="__main__")
