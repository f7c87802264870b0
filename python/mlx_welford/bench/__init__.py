"""Speed and memory of the layers on this machine: ``python -m mlx_welford bench``.

Its modules need the extra ``bench``. bench/ of the repository makes docs/performance.md with them.
"""
