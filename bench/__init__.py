"""Speed and memory, compared with mlx.nn, torch and a copy: README.md."""
