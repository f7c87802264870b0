"""The tests here are for the macOS binaries: `make test-macos` runs them, `make test` does not."""

import os

import mlx.core as mx
import pytest

collect_ignore_glob = [] if "MLX_WELFORD_GPU" in os.environ else ["test_*.py"]


@pytest.fixture(autouse=True)
def device(backend: str) -> None:
    """The GPU, which is a Mac's default device; the suite's own fixture takes the CPU."""
    mx.set_default_device(mx.gpu)
