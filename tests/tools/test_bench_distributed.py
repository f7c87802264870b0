"""bench/distributed.py: its model's arithmetic and its files; one round of two processes."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from numpy.testing import assert_allclose

from bench import distributed
from bench.distributed import Collective, Layer, Measured, Network

NETWORK = Network(latency=1e-5, per_byte=1e-9)


def test_steps_and_bytes_of_a_ring() -> None:
    assert_allclose(NETWORK.gather(4, 1000), 3 * (1e-5 + 1e-6))
    assert_allclose(NETWORK.sum(4, 1000), 6 * (1e-5 + 0.25e-6))
    assert NETWORK.gather(1, 1000) == NETWORK.sum(1, 1000) == 0


def test_bytes_of_a_layer_are_those_of_its_messages() -> None:
    """16 of each channel and of the row about them; 8 of each channel."""
    assert distributed.forward_bytes(64) == 16 * 65
    assert distributed.backward_bytes(64) == 8 * 64
    assert_allclose(NETWORK.layer(2, 64), 1e-5 + 1.04e-6 + 2 * (1e-5 + 0.256e-6))


@pytest.mark.parametrize("network", [NETWORK, Network(3e-4, 8e-9)])
def test_the_fit_finds_what_a_ring_was_made_of(network: Network) -> None:
    measured = [
        Collective(kind, ranks, size, 1e3 * getattr(network, kind)(ranks, size))
        for kind in ("gather", "sum")
        for ranks in (2, 3, 4)
        for size in (100, 10_000, 1_000_000)
    ]
    found = distributed.fit(measured)
    assert_allclose([found.latency, found.per_byte], [network.latency, network.per_byte])


def made_up() -> Measured:
    layers = [
        Layer(name, ranks, channels, 1.0 + ranks + channels / 1000)
        for ranks in distributed.RANKS
        for name in ("BatchNorm", "SyncBatchNorm")
        for channels in distributed.CHANNELS
    ]
    collectives = [
        Collective(kind, 2, size, 1e3 * getattr(NETWORK, kind)(2, size))
        for kind in ("gather", "sum")
        for size in (100, 100_000)
    ]
    return Measured({"cpu": "a processor", "cores": 2}, layers, collectives)


def test_figures_are_written_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, copy, drawing = (tmp_path / name for name in ("a.json", "b.json", "c.svg"))
    source.write_text(json.dumps(asdict(made_up())))
    options = ["--from", str(source), "--json", str(copy), "--plot", str(drawing)]
    assert distributed.main(options) == 0
    assert distributed.load(copy.read_text()) == made_up()
    assert drawing.read_text().startswith("<?xml")
    printed = capsys.readouterr().out
    assert "latency 10.0 us, 1.00 GB/s" in printed
    assert "SyncBatchNorm, 4" in printed
    assert f"{1e3 * NETWORK.layer(1024, 4096):10.3f}" in printed


def test_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.json"
    source.write_text(json.dumps(asdict(made_up())))
    options = ["--from", str(source), "--latency", "50", "--bandwidth", "2"]
    assert distributed.main(options) == 0
    assert "latency 50.0 us, 2.00 GB/s" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        distributed.main(["--latency", "50"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_round(ranks: int) -> None:
    found = distributed.run_ranks(ranks, 1)
    assert [(layer.name, layer.ranks, layer.channels) for layer in found.layers] == [
        (name, ranks, channels)
        for channels in distributed.CHANNELS
        for name in ("BatchNorm", "SyncBatchNorm")
    ]
    assert all(layer.milliseconds > 0 for layer in found.layers)
    assert len(found.collectives) == (10 if ranks > 1 else 0)
    assert {c.ranks for c in found.collectives} <= {ranks}
