"""Runs a script with the CPU as MLX's default device, which on a Mac is the GPU otherwise.

python on_cpu.py SCRIPT ARGUMENTS...

It ends when its standard input does. So a process of a group, which spins while it waits for the
others, does not outlive the one that started it.
"""

import os
import runpy
import sys
import threading
from pathlib import Path

import mlx.core as mx


def end_with_input() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_input, daemon=True).start()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    mx.set_default_device(mx.cpu)
    runpy.run_path(sys.argv[0], run_name="__main__")
