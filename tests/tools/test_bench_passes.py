"""bench.passes: the models are those that it names, and the table in the documentation is its."""

from pathlib import Path

import pytest

from bench.passes import FUSED, MODELS, NORM, Model, Normalization, resnet50, table, vae_decoder

PERFORMANCE = Path(__file__).parents[2] / "docs" / "performance.md"


def test_the_models_have_the_known_sizes() -> None:
    assert len(resnet50().normalizations) == 53
    assert resnet50().multiplications == pytest.approx(4.09e9, rel=0.01)  # torchvision's GFLOPS
    assert len(vae_decoder().normalizations) == 30


def test_passes_of_a_normalization() -> None:
    plain = Normalization(1, activation=False)
    assert [plain.separate(mode) for mode in NORM] == [3, 5] == [plain.fused(mode) for mode in NORM]
    both = Normalization(1, addition=True)
    assert [both.separate(mode) for mode in NORM] == [8, 8]
    assert [both.fused(mode) for mode in NORM] == [4, 7] == list(FUSED[True, True].values())


def test_a_share_is_of_bytes_and_multiplications() -> None:
    model = Model("one", ("forward",))
    model.norm(400_000_000_000 // 4 // 5)  # read and written five times: a second
    model.convolution(13_600_000_000_000 // 2, 1, 1, 3)  # three seconds
    assert model.share == pytest.approx(0.25)


def test_the_documentation_has_the_table() -> None:
    assert "\n".join(table(model() for model in MODELS)) in PERFORMANCE.read_text("utf-8")
