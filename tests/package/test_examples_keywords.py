"""The keyword spotting example through its functions, with few steps."""

from pathlib import Path

import keyword_spotting
import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from comparison import compare, largest_distance
from keyword_spotting import (
    BANDS,
    KEYWORDS,
    RATE,
    SAMPLES,
    confusions,
    draw,
    filters,
    log_mel,
    loss,
)


@pytest.mark.parametrize("frequency", [300, 1000, 2500])
def test_a_tone_is_in_the_band_of_its_pitch(frequency: int) -> None:
    wave = np.sin(2 * np.pi * frequency * np.arange(SAMPLES) / RATE).astype(np.float32)
    bands = log_mel(wave[None])[0, ..., 0]
    assert bands.shape == (30, BANDS)
    mel, end = (2595 * np.log10(1 + f / 700) for f in (frequency, RATE / 2))
    expected = mel / end * (BANDS + 1) - 1
    assert (abs(bands.argmax(-1) - expected) < 1).all()


def test_filters_cover_every_frequency_between_the_edges() -> None:
    total = filters().sum(-1)
    assert (filters().max(0) > 0).all()
    np.testing.assert_allclose(total[3:-10], 1, atol=1e-5)


def test_recordings_hold_the_keyword_of_their_label() -> None:
    """Rising pitch is rising in the spectrogram, and so on: the loudest band per frame."""
    labels = np.arange(len(KEYWORDS), dtype=np.int32)

    class Silent:
        """Draws the middle of each range, and no noise."""

        def normal(self, mean: float, _: float, shape: tuple[int, ...]) -> object:
            return np.zeros(shape)

        def uniform(self, low: float, high: float) -> float:
            return (low + high) / 2

        def integers(self, low: int, high: int) -> int:
            return (low + high) // 2

    recordings = keyword_spotting.record(labels, Silent())  # type: ignore[arg-type]
    bands = log_mel(recordings)[..., 0]
    loudest = dict(zip(KEYWORDS, bands[:, 8:-8].argmax(-1), strict=True))
    assert np.ptp(loudest["tone"]) == 0
    for name, sign in {"rise": 1, "steep rise": 1, "fall": -1, "steep fall": -1}.items():
        assert (sign * np.diff(loudest[name]) >= 0).all(), name
    assert np.ptp(loudest["steep rise"]) > np.ptp(loudest["rise"]) > 2
    middle = len(loudest["hill"]) // 2
    assert loudest["hill"][middle] > loudest["hill"][[0, -1]].max()
    assert len(set(loudest["two notes"])) == 2
    assert (np.diff(np.sign(np.diff(loudest["warble"]))) != 0).sum() >= 4


def test_all_variants_compute_the_same_steps() -> None:
    mx.random.seed(0)
    model: nn.Module = keyword_spotting.network(4)
    batches = [tuple(map(mx.array, draw(8, np.random.default_rng(0))))]
    compared = compare(model, nn.value_and_grad(model, loss), batches)
    for steps in compared.values():
        assert largest_distance(steps, compared["mlx.nn"]) < 1e-4
    mw.accelerate(model, fuse=True)
    norms = [m for m in model.modules() if isinstance(m, mw.BatchNorm)]
    assert [norm.activation for norm in norms] == ["relu"] * 6


def test_training_and_evaluation() -> None:
    mx.random.seed(0)
    rng = np.random.default_rng(0)
    model: nn.Module = keyword_spotting.network(4)
    mw.accelerate(model, fuse=True)
    keyword_spotting.train(model, steps=50, batch_size=32, rng=rng)
    spectrograms, labels = draw(64, rng)
    evaluated = keyword_spotting.evaluate(model, spectrograms)
    eager, compiled = (logits for logits, _ in evaluated.values())
    np.testing.assert_allclose(compiled, eager, atol=1e-4)
    assert np.mean(eager.argmax(-1) == labels) > 2 / len(KEYWORDS)
    # Evaluation uses the running statistics: a recording's logits do not depend on the others.
    alone = np.array(model(mx.array(spectrograms[:1])))
    np.testing.assert_allclose(alone, eager[:1], atol=1e-4)


def test_confusions() -> None:
    counts = confusions(np.array([1, 1, 0], np.int32), np.array([1, 0, 0], np.int32))
    assert counts[1, 1] == counts[0, 1] == counts[0, 0] == 1
    assert counts.sum() == 3


def test_the_program_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keywords.png"
    # A few steps do not suffice, and the program says so.
    assert keyword_spotting.main(["--quick", "--output", str(path)]) == 1
    printed = capsys.readouterr().out
    for text in ("eager: accuracy", "compiled: accuracy", "| median time"):
        assert text in printed
    shown = matplotlib.image.imread(path)
    assert shown.shape[:2] == (320, 720)
    assert shown[..., :3].std() > 0.1
