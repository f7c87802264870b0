"""Runs the macOS binaries on Linux: MLX's wheels and this package's, on an emulated processor.

`run` puts it together. `debian` has the processor, CPython and the C library, `libcxx` Apple's C++
library from its sources, `packages` the wheels. ``host/`` is the module that loads Mach-O files and
plays macOS for them: ``image``, ``fixups``, ``symbols`` and ``thread_locals`` do what dyld does,
``system_*`` are libSystem, ``objc`` is the Objective-C runtime, ``metal_*`` is Metal. `gpu` runs
the dispatches, in a process of its own; `kernels` has the kernels, `hazards` finds what Metal
leaves undefined. ``guest.py`` and ``guest_plugin.py`` run in the emulated CPython, as the tests do.
"""
