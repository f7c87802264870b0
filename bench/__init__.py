"""The measurements of docs/performance.md, with the modules of mlx_welford.bench: README.md."""
