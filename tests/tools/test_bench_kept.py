"""bench.kept: its table and its plot. tests/graph/test_kept_for_backward.py measures its models."""

from pathlib import Path
from xml.etree import ElementTree

import mlx.nn as nn
import mlx_welford as mw
from mlx_welford.bench.implementations import BASELINE, OURS, UNFUSED

from bench.kept import IMPLEMENTATIONS, FusedBasic, converted, draw, measured, resnet, table

FIGURES = {"one": {BASELINE: 3_000_000, UNFUSED: 2_000_000, OURS: 1_250_000}}


def test_table() -> None:
    assert table(FIGURES).splitlines() == [
        "| model | mlx.nn, MB | mlx_welford unfused, MB | mlx_welford, MB |",
        "| --- | --- | --- | --- |",
        "| one | 3.0 | 2.0 | 1.2 |",
    ]


def test_plot(tmp_path: Path) -> None:
    draw(FIGURES, tmp_path / "kept.svg")
    assert ElementTree.parse(tmp_path / "kept.svg").getroot().tag.endswith("svg")


def test_implementations() -> None:
    theirs, unfused, fused = (
        list(converted(resnet(4), implementation).modules()) for implementation in IMPLEMENTATIONS
    )
    assert not any(isinstance(layer, mw.BatchNorm) for layer in theirs)
    norms = [layer for layer in unfused if isinstance(layer, nn.BatchNorm)]
    assert len(norms) == 20
    assert all(type(layer) is mw.BatchNorm and layer.activation is None for layer in norms)
    assert sum(isinstance(layer, FusedBasic) for layer in fused) == 8
    # But for those of the shortcuts all are followed by relu.
    assert [layer.activation for layer in fused if isinstance(layer, mw.BatchNorm)].count(None) == 3


def test_more_is_kept_by_more_operations() -> None:
    found = measured({"small": (resnet, 4, (2, 16, 16, 3))})["small"]
    assert found[BASELINE] > found[UNFUSED] > found[OURS] > 2 * 16 * 16 * 4 * 4
