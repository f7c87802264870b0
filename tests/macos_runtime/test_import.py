"""The binaries load, and behave as on a Mac."""

import mlx.core as mx
import mlx_welford as mw
import pytest


def test_the_device_is_the_gpu() -> None:
    assert mx.default_device() == mx.Device(mx.gpu)
    assert mx.device_info(mx.gpu)["device_name"] == "Simulated M1"


def test_the_status_is_that_of_a_mac() -> None:
    status = mw.status()
    assert status["system"].startswith("macOS")
    assert status["machine"] == "arm64"
    assert status["backend"] == "metal"
    assert status["shaders_compile"] is True
    assert status["simulator"] is False


def test_an_exception_crosses_libraries() -> None:
    """Thrown by libmlx, caught by its Python bindings; thrown and caught by the extension."""
    with pytest.raises(ValueError, match="reshape"):
        mx.reshape(mx.zeros((2,)), (3,))
    with pytest.raises(ValueError, match="eps"):
        mw.batch_norm(mx.zeros((2, 3)), eps=-1.0)
