"""The style transfer example through its functions, for a moment instead of minutes."""

from functools import partial
from pathlib import Path

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
import style_transfer
from style_transfer import Image, Reflect, Textures, contours, load, network, paint, train

NORM = partial(mw.InstanceNorm, affine=True)


@pytest.fixture(scope="module")
def photographs() -> tuple[Image, Image]:
    return load("temple"), load("flower")


def test_photographs(photographs: tuple[Image, Image]) -> None:
    for image in photographs:
        assert image.shape == (212, 320, 3)
        assert image.min() >= 0
        assert 0.9 < image.max() <= 1
    assert abs(photographs[0] - photographs[1]).mean() > 0.1


def test_training_brings_the_textures_closer(photographs: tuple[Image, Image]) -> None:
    content, style = photographs
    training = train(content, style, norm=NORM, steps=12, size=32, width=6)
    assert len(training.losses) == 12
    assert min(training.losses[-3:]) < training.losses[0] / 2
    painted = paint(training.model, content)
    assert painted.shape == content.shape
    assert 0 <= painted.min() < painted.max() <= 1


def test_the_course_is_that_of_mlx_nn(photographs: tuple[Image, Image]) -> None:
    ours = train(*photographs, norm=NORM, steps=4, size=32, width=6).losses
    theirs = partial(nn.InstanceNorm, affine=True)
    expected = train(*photographs, norm=theirs, steps=4, size=32, width=6).losses
    np.testing.assert_allclose(ours, expected, rtol=2e-3)


def test_every_convolution_but_the_last_has_its_norm() -> None:
    model = network(6, NORM)
    layers = [module for module in model.modules() if isinstance(module, mw.InstanceNorm)]
    assert len(layers) == 7
    assert {layer.dims for layer in layers} == {6, 12}
    x = mx.random.uniform(shape=(1, 32, 32, 3))
    # What instance normalisation is for here: the contrast of the input makes no difference.
    np.testing.assert_allclose(np.array(model(x * 2)), np.array(model(x)), atol=1e-3)


def test_textures_do_not_depend_on_the_arrangement() -> None:
    textures = Textures(filters=6, scales=2, seed=0)
    x = mx.random.uniform(shape=(1, 32, 32, 3))
    other = mx.random.uniform(shape=(1, 32, 32, 3)) ** 3
    turned = mx.roll(x, 16, 1)
    for a, b, c in zip(textures(x), textures(turned), textures(other), strict=True):
        assert a.shape == (1, 6, 6)
        moved, different = (float(np.abs(np.array(a - d)).max()) for d in (b, c))
        assert moved < 0.2 * different


def test_contours_do_not_depend_on_the_brightness() -> None:
    x = mx.random.uniform(shape=(1, 32, 32, 3))
    np.testing.assert_allclose(np.array(contours(x + 0.5)), np.array(contours(x)), atol=1e-5)


def test_the_border_is_mirrored() -> None:
    x = mx.random.normal((2, 5, 7, 3))
    pads = ((0, 0), (2, 2), (2, 2), (0, 0))
    np.testing.assert_array_equal(Reflect(2)(x), np.pad(np.array(x), pads, mode="reflect"))


def test_a_grey_image_is_painted_without_a_frame() -> None:
    mx.random.seed(0)
    painted = network(6, NORM)(mx.full((1, 32, 32, 3), 0.5))
    np.testing.assert_allclose(painted, mx.broadcast_to(painted[:, 16:17, 16:17], painted.shape))


def test_the_program_writes_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style_transfer, "train", partial(train, size=32, width=4))
    path = tmp_path / "picture.png"
    # Two steps do not bring the loss to a third, and the program says so.
    assert style_transfer.main(["--steps", "2", "--output", str(path)]) == 1
    picture = matplotlib.image.imread(path)[..., :3]
    assert picture.shape == (212, 960, 3)
    np.testing.assert_allclose(picture[:, :320], load("temple"), atol=1 / 255)
    np.testing.assert_allclose(picture[:, 320:640], load("flower"), atol=1 / 255)
    printed = capsys.readouterr().out
    assert "loss" in printed
    assert "| median time" in printed
