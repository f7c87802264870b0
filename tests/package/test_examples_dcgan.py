"""The DCGAN example through its functions, with few steps."""

import re
from pathlib import Path

import dcgan_digits
import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import numpy.typing as npt
import pytest
from comparison import compare, largest_distance
from dcgan_digits import DCGAN, LATENT, SIZE, Images, Judge, latent, loss_and_grad, sample
from mlx.utils import tree_flatten
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def digits() -> tuple[Images, npt.NDArray[np.int64]]:
    return dcgan_digits.load()


def test_digits_are_enlarged(digits: tuple[Images, npt.NDArray[np.int64]]) -> None:
    images, labels = digits
    assert images.shape == (1797, SIZE, SIZE, 1)
    assert labels.shape == (1797,)
    assert images.min() == -1
    assert images.max() == 1
    small = images.reshape(-1, 8, 2, 8, 2).mean((2, 4))
    assert abs(small - (load_digits().images / 8 - 1)).mean() < 0.1


def test_all_variants_compute_the_same_steps(
    digits: tuple[Images, npt.NDArray[np.int64]],
) -> None:
    mx.random.seed(0)
    model: nn.Module = DCGAN(4)
    model.apply(lambda parameter: 4 * parameter)  # or all logits are almost 0
    batch = (mx.array(digits[0][:16]), latent(16))
    compared = compare(model, loss_and_grad, [batch])
    for steps in compared.values():
        assert 0 <= largest_distance(steps, compared["mlx.nn"]) < 1e-4
    mw.accelerate(model, fuse=True)
    norms = [m for m in model.modules() if isinstance(m, mw.BatchNorm)]
    assert sorted(str(norm.activation) for norm in norms) == ["leaky_relu", "relu", "relu"]


def test_each_network_gets_the_gradients_of_its_loss(
    digits: tuple[Images, npt.NDArray[np.int64]],
) -> None:
    """A step down the generator's gradients lowers its loss, and so with the discriminator's."""
    mx.random.seed(0)
    model = DCGAN(4)
    real, noise = mx.array(digits[0][:16]), latent(16)
    _, (generators, discriminators) = loss_and_grad(model, real, noise)

    def losses() -> tuple[float, float]:
        drawn = model.generator(noise)
        judged = dcgan_digits.judge(model.discriminator, real, drawn)
        deceived = dcgan_digits.deceive(model.generator, model.discriminator, noise)
        return float(judged), float(deceived)

    for network, gradients, which in (
        (model.generator, generators, 1),
        (model.discriminator, discriminators, 0),
    ):
        before = losses()
        parameters = dict(tree_flatten(network.trainable_parameters()))
        steps = dict(tree_flatten(gradients))
        assert steps.keys() == parameters.keys()
        # The length of the step is small, and what it gains follows from the gradients.
        squares = sum(float((step**2).sum()) for step in steps.values())
        rate = 1e-3 / squares
        moved = [(name, value - rate * steps[name]) for name, value in parameters.items()]
        network.load_weights(moved, strict=False)
        gain = before[which] - losses()[which]
        np.testing.assert_allclose(gain, 1e-3, rtol=0.2)
        network.load_weights(list(parameters.items()), strict=False)


def test_the_judge_knows_real_digits(digits: tuple[Images, npt.NDArray[np.int64]]) -> None:
    images, labels = digits
    judge = Judge(images, labels)
    np.testing.assert_array_equal(judge.counts(images), np.bincount(labels))
    assert judge.ratio(images) == 0
    noise = np.random.default_rng(0).uniform(-1, 1, (20, SIZE, SIZE, 1)).astype(np.float32)
    assert judge.ratio(noise) > 2


def test_samples_follow_the_noise() -> None:
    mx.random.seed(0)
    model = DCGAN(4)
    samples = sample(model, 3)
    assert samples.shape == (3, SIZE, SIZE, 1)
    assert latent(3).shape == (3, 1, 1, LATENT)
    assert abs(samples[0] - samples[1]).max() > 0
    assert abs(samples).max() <= 1


def test_the_program_trains_and_writes_the_picture(
    digits: tuple[Images, npt.NDArray[np.int64]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "digits.png"
    # Two steps do not suffice, and the program says so.
    assert dcgan_digits.main(["--quick", "--output", str(path)]) == 1
    printed = capsys.readouterr().out
    found = re.search(r"samples of 0 to 9: ([\d ]+)", printed)
    assert found is not None, printed
    assert sum(map(int, found[1].split())) == 500
    assert "| median time" in printed

    shown = matplotlib.image.imread(path)[..., 0] * 2 - 1
    expected = dcgan_digits.picture(digits[0][:40], np.zeros((120, SIZE, SIZE, 1), np.float32))
    assert shown.shape == expected.shape
    np.testing.assert_allclose(shown[:72], expected[:72], atol=0.02)
