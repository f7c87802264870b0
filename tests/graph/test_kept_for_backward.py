"""What a training step keeps for its backward pass: less where layers are fused."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_welford.bench.implementations import OURS, UNFUSED
from tolerance import wide
from trees import leaves

from bench.kept import Model, UNet3d, converted, kept, resnet

pytestmark = [
    pytest.mark.every_backend,
    pytest.mark.kernels("the memory that they need"),
]

MODELS: dict[str, Model] = {  # of bench.kept, an eighth as wide
    "resnet": (resnet, 8, (2, 32, 32, 3)),
    "3-D U-Net": (UNet3d, 4, (1, 16, 16, 16, 1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_fused_layers_keep_at_most_70_percent(name: str) -> None:
    make, width, shape = MODELS[name]
    x = mx.random.normal(shape)
    measured, gradients = {}, {}
    for implementation in (UNFUSED, OURS):
        mx.random.seed(1)
        model = converted(make(width), implementation)
        measured[implementation], found = kept(model, x)
        gradients[implementation] = {path: wide(a) for path, a in leaves(found).items()}
        del model, found
    assert gradients[OURS].keys() == gradients[UNFUSED].keys()
    for path, expected in gradients[UNFUSED].items():
        size = max(1e-3, float(np.abs(expected).max()))
        np.testing.assert_allclose(gradients[OURS][path], expected, atol=2e-2 * size, err_msg=path)
    assert measured[OURS] <= 0.7 * measured[UNFUSED]
