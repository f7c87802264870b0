"""The diffusion example through its functions, with few steps."""

import re
from pathlib import Path

import diffusion_digits
import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from comparison import compare, largest_distance
from diffusion_digits import ANY, CLASSES, Digits, UNet, loss, signal


@pytest.fixture(scope="module")
def digits() -> Digits:
    return diffusion_digits.load()


def test_digits(digits: Digits) -> None:
    assert digits.images.shape == (1797, 8, 8, 1)
    assert digits.images.min() == -1
    assert digits.images.max() == 1
    some = digits.of_each_class(2)
    assert some.shape == (20, 8, 8, 1)
    pairs = zip(digits.images, digits.labels, strict=True)
    known = {image.tobytes(): label for image, label in pairs}
    assert [known[image.tobytes()] for image in some] == [*range(CLASSES)] * 2


def test_every_group_norm_is_ours_and_back() -> None:
    model: nn.Module = UNet(8, 16)
    layers = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(layers) == 10
    mw.accelerate(model)
    assert {type(layer) for layer in layers} == {mw.GroupNorm}
    mw.restore(model)
    assert {type(layer) for layer in layers} == {nn.GroupNorm}


def test_the_signal_falls_from_all_to_nothing() -> None:
    shares = np.array(signal(mx.linspace(0, 1, 50)))
    assert shares[0] > 0.999
    assert shares[-1] < 1e-6
    assert (np.diff(shares) < 0).all()


def test_the_class_and_the_level_matter() -> None:
    mx.random.seed(0)
    model: nn.Module = UNet(8, 16)
    x = mx.random.normal((1, 8, 8, 1))

    def noise(level: float, label: int) -> mx.array:
        y: mx.array = model(x, mx.array([level]), mx.array([label]))
        return y

    first = noise(0.5, 3)
    assert first.shape == x.shape
    for other in (noise(0.5, 4), noise(0.5, ANY), noise(0.1, 3)):
        assert not np.allclose(other, first, atol=1e-3)


def test_sampling_with_the_true_noise_gives_the_image(digits: Digits) -> None:
    """If the predicted noise is exactly that of one image, sampling ends at this image."""
    image = mx.array(digits.images[:2])

    class Oracle(nn.Module):
        def __call__(self, x: mx.array, levels: mx.array, labels: mx.array) -> mx.array:
            share = signal(levels)[:, None, None, None]
            return (x - mx.sqrt(share) * image) / mx.sqrt(1 - share)

    oracle: nn.Module = Oracle()  # type: ignore[no-untyped-call]
    drawn = diffusion_digits.sample(oracle, mx.array([0, 1]), 10)
    np.testing.assert_allclose(drawn, image, atol=1e-4)


def test_all_variants_compute_the_same_steps(digits: Digits) -> None:
    mx.random.seed(0)
    model: nn.Module = UNet(8, 16)
    batches = [digits.batch(8, np.random.default_rng(0))]
    compared = compare(model, nn.value_and_grad(model, loss), batches)
    for steps in compared.values():
        assert largest_distance(steps, compared["mlx.nn"]) < 1e-5
    mw.accelerate(model, fuse=True)
    norms = [m for m in model.modules() if isinstance(m, mw.GroupNorm)]
    assert sorted(str(norm.activation) for norm in norms) == 5 * ["None"] + 5 * ["silu"]


@pytest.mark.slow
def test_the_program_trains_and_writes_the_picture(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "digits.png"
    status = diffusion_digits.main(["--quick", "--output", str(path)])
    printed = capsys.readouterr().out
    assert "| median time" in printed
    found = re.search(r"loss (\S+) at first, (\S+) at last", printed)
    assert found is not None, printed
    first, last = map(float, found.groups())
    assert first > 0.8
    assert last < 0.5
    assert status == (last >= diffusion_digits.LARGEST_LOSS)

    shown = matplotlib.image.imread(path)[..., 0] * 2 - 1
    samples = np.zeros((10, 8, 8, 1), np.float32)
    expected = diffusion_digits.picture(digits.of_each_class(2), samples)
    assert shown.shape == expected.shape
    real = expected.shape[0] * 2 // 3
    np.testing.assert_allclose(shown[:real], expected[:real], atol=0.02)
