"""The digits example through its functions, for a moment instead of a minute."""

import json
from pathlib import Path

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
import train_digits
from mlx.utils import tree_flatten
from train_digits import Digits, Training


def short(data: tuple[Digits, Digits], norm: type[nn.Module], *, seed: int = 3) -> Training:
    return train_digits.train(
        norm, data, epochs=1, batch_size=64, width=4, seed=seed, label="digits"
    )


@pytest.fixture(scope="module")
def data() -> tuple[Digits, Digits]:
    return train_digits.load()


@pytest.fixture(scope="module")
def trainings(data: tuple[Digits, Digits]) -> dict[str, Training]:
    return {"mlx.nn": short(data, nn.BatchNorm), "mlx_welford": short(data, mw.BatchNorm)}


def test_split_is_fixed_stratified_and_disjoint(data: tuple[Digits, Digits]) -> None:
    train, test = data
    assert train.images.shape == (1347, 8, 8, 1)
    assert test.images.shape == (450, 8, 8, 1)
    assert train.images.min() == 0
    assert train.images.max() == 1
    counts = np.bincount(test.labels)
    assert counts.shape == (10,)
    assert counts.min() >= 43
    assert counts.max() <= 46
    again, _ = train_digits.load()
    np.testing.assert_array_equal(train.images, again.images)
    assert not {image.tobytes() for image in train.images} & {i.tobytes() for i in test.images}


def test_batches_cover_whole_batches_of_the_data_once(data: tuple[Digits, Digits]) -> None:
    _, test = data
    images, labels = zip(*test.batches(64, np.random.default_rng(0)), strict=True)
    assert len(images) == 450 // 64
    drawn = np.concatenate([np.array(batch) for batch in images])
    known = {image.tobytes(): label for image, label in zip(test.images, test.labels, strict=True)}
    drawn_labels = np.concatenate([np.array(batch) for batch in labels])
    assert [known[image.tobytes()] for image in drawn] == drawn_labels.tolist()
    assert len({image.tobytes() for image in drawn}) == len(drawn) == 448


def test_networks_differ_only_in_the_class_of_the_layer() -> None:
    networks: list[nn.Module] = []
    for norm in (nn.BatchNorm, mw.BatchNorm):
        mx.random.seed(5)
        networks.append(train_digits.ResNet(norm, 4))
    baseline, ours = (dict(tree_flatten(network.parameters())) for network in networks)
    assert baseline.keys() == ours.keys()
    for name, value in baseline.items():
        np.testing.assert_array_equal(np.array(value), np.array(ours[name]), err_msg=name)
    kinds = [type(module) for module in networks[1].modules()]
    assert kinds.count(mw.BatchNorm) == 9
    assert nn.BatchNorm not in kinds


def test_both_libraries_train_alike(trainings: dict[str, Training]) -> None:
    baseline, ours = trainings["mlx.nn"], trainings["mlx_welford"]
    assert len(ours.losses) == 1347 // 64
    # Rounding alone separates them, and grows with every step: the first are the ones to compare.
    np.testing.assert_allclose(ours.losses[:5], baseline.losses[:5], rtol=1e-3)
    assert ours.losses[-1] < 0.8 * ours.losses[0]
    assert ours.accuracy > 0.3
    assert ours.step_ms > 0
    assert ours.peak_bytes > 64 * 8 * 8 * 4 * 4  # at least one activation of the first stage


def test_training_is_deterministic(
    data: tuple[Digits, Digits], trainings: dict[str, Training]
) -> None:
    again = short(data, mw.BatchNorm)
    assert again.losses == trainings["mlx_welford"].losses
    assert again.accuracy == trainings["mlx_welford"].accuracy
    assert short(data, mw.BatchNorm, seed=4).losses != again.losses


def training(accuracy: float, *losses: float) -> Training:
    return Training(accuracy=accuracy, losses=list(losses), step_ms=1.0, peak_bytes=1)


def test_loss_difference_is_the_largest_at_any_step() -> None:
    curves = {"a": training(1, 3.0, 2.0, 1.0), "b": training(1, 3.0, 2.5, 0.75)}
    assert train_digits.loss_difference(curves) == 0.5


@pytest.mark.parametrize(
    ("accuracies", "texts"),
    [
        ((0.97, 0.98), []),
        ((441 / 450, 437 / 450), []),
        ((0.99, 0.975), ["differ by 1.50 points"]),
        ((0.975, 0.965), ["ours reached 96.50% test accuracy"]),
        ((float("nan"), 0.99), ["mlx.nn reached nan%"]),
        ((0.9, 0.95), ["mlx.nn reached", "ours reached", "differ by 5.00 points"]),
    ],
)
def test_problems(accuracies: tuple[float, float], texts: list[str]) -> None:
    baseline, ours = map(training, accuracies)
    found = train_digits.problems({"mlx.nn": baseline, "ours": ours})
    assert len(found) == len(texts)
    for problem, text in zip(found, texts, strict=True):
        assert text in problem


def test_main_fails_on_low_accuracy_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "digits.json"
    drawn = tmp_path / "digits.png"
    options = ["--epochs", "1", "--width", "2", "--batch-size", "256", "--json", str(path)]
    options += ["--output", str(drawn)]
    assert train_digits.main(options) == 1
    printed = capsys.readouterr().out
    for text in ("test accuracy", "median step", "peak memory", "largest difference", "FAILED"):
        assert text in printed
    report = json.loads(path.read_text())
    assert report.keys() == {"mlx.nn", "mlx_welford"}
    assert len(report["mlx_welford"]["losses"]) == 1347 // 256
    shown = matplotlib.image.imread(drawn)[..., :3]
    assert shown.shape == (300, 600, 3)
    for colour in ([0x1F, 0x77, 0xB4], [0xFF, 0x7F, 0x0E]):  # of both curves
        assert (abs(shown * 255 - colour).max(-1) < 8).any()
