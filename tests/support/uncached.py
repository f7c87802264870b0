"""A pytest plugin: MLX frees memory at once, so that AddressSanitizer sees uses after that."""

import mlx.core as mx

mx.set_cache_limit(0)
