"""The example of the 3-D U-Net through its functions, with few steps."""

import re
from pathlib import Path

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
import unet3d_volumes
from comparison import compare, largest_distance
from unet3d_volumes import COLOURS, SIZE, UNet, dice, draw, loss, picture, predict


def test_volumes_show_what_the_labels_say() -> None:
    volumes, labels = draw(8, np.random.default_rng(0))
    assert volumes.shape == (8, SIZE, SIZE, SIZE, 1)
    assert set(np.unique(labels)) == {0, 1, 2}
    sphere, ellipsoid, background = (volumes[..., 0][labels == k].mean() for k in (1, 2, 0))
    np.testing.assert_allclose([sphere - background, ellipsoid - background], [1, 0.6], atol=0.15)
    # Principal deviations: equal for a sphere, an ellipsoid is elongated.
    ratios: dict[int, list[float]] = {1: [], 2: []}
    for label in labels:
        for kind, found in ratios.items():
            spread = np.linalg.eigvalsh(np.cov(np.argwhere(label == kind).T))
            found.append(float(np.sqrt(spread[-1] / spread[0])))
    assert np.median(ratios[1]) < 1.2
    assert np.median(ratios[2]) > 2


def test_dice() -> None:
    true = np.array([0, 1, 1, 2, 2, 2], np.int32)
    np.testing.assert_array_equal(dice(true, true), [1, 1])
    found = np.array([1, 1, 0, 2, 0, 0], np.int32)
    np.testing.assert_allclose(dice(found, true), [2 / 4, 2 / 4])


def test_both_libraries_and_the_fused_network_compute_the_same_steps() -> None:
    mx.random.seed(0)
    model: nn.Module = UNet(2)
    mw.accelerate(model, fuse=True)
    norms = [m for m in model.modules() if isinstance(m, mw.InstanceNorm)]
    assert [norm.activation for norm in norms] == ["leaky_relu"] * 10
    handing_over = [
        m for m in model.modules() if isinstance(m, nn.Conv3d) and type(m) is not nn.Conv3d
    ]
    assert len(handing_over) == 10
    # A bias cancels in the normalisation, but must not change what is computed.
    for convolution in handing_over:
        convolution.bias = mx.random.normal(convolution.bias.shape)
    batch = tuple(map(mx.array, draw(1, np.random.default_rng(0))))
    compared = compare(model, nn.value_and_grad(model, loss), [batch])
    for steps in compared.values():
        assert largest_distance(steps, compared["mlx.nn"]) < 1e-4


def test_training_lowers_the_loss() -> None:
    mx.random.seed(0)
    model: nn.Module = UNet(4)
    mw.accelerate(model, fuse=True)
    losses = unet3d_volumes.train(model, steps=12, batch_size=1, rng=np.random.default_rng(0))
    assert np.mean(losses[-3:]) < 0.75 * losses[0]


def test_the_program_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "volumes.png"
    # Two steps do not suffice, and the program says so.
    assert unet3d_volumes.main(["--quick", "--output", str(path)]) == 1
    printed = capsys.readouterr().out
    assert len(re.findall(r"Dice of \w+: 0\.\d+ before, 0\.\d+ after", printed)) == 2
    assert "| median time" in printed
    volumes, labels = draw(2, np.random.default_rng(0))
    expected = picture(volumes, labels, labels)
    shown = matplotlib.image.imread(path)[..., :3]
    assert shown.shape == expected.shape
    known = len(shown) * 2 // 3
    np.testing.assert_allclose(shown[:known], expected[:known], atol=0.01)


def test_predictions_are_labels_of_each_voxel() -> None:
    mx.random.seed(0)
    model: nn.Module = UNet(2)
    volumes, _ = draw(2, np.random.default_rng(0))
    predicted = predict(model, volumes)
    assert predicted.shape == (2, SIZE, SIZE, SIZE)
    np.testing.assert_array_equal(predicted[:1], predict(model, volumes[:1]))
    assert predicted.max() < len(COLOURS)
