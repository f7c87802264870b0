"""examples/train_distributed.py with a few steps of a narrow network, on one and two processes."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import train_distributed
from ranks import Ended, free_ports, run_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "train_distributed.py"
SHORT = ["--epochs", "1", "--width", "4", "--batch-size", "128"]


def run(processes: int, directory: Path, *options: str) -> list[Ended]:
    directory.mkdir()
    return run_ranks(processes, SCRIPT, *SHORT, *options, directory=directory)


def losses(text: str) -> list[float]:
    """Of the first and the last step."""
    found = re.search(r"loss, first and last step (\S+) (\S+)", text)
    assert found is not None, text
    return [float(loss) for loss in found.groups()]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One process with the whole batch."""
    (ended,) = run(1, tmp_path_factory.mktemp("one") / "rank")
    return ended


@pytest.mark.slow
def test_two_processes_train_as_one(one: Ended, tmp_path: Path) -> None:
    first, second = run(2, tmp_path / "two")
    assert "processes                 2" in first.text
    assert "the same on all processes" in first.text
    assert "not the same" not in first.text
    np.testing.assert_allclose(losses(first.text), losses(one.text), rtol=5e-6)
    assert losses(one.text)[1] < 0.95 * losses(one.text)[0]
    assert second.text.strip() == ""  # one speaks for all
    # Ten steps are too few for 97 %.
    assert [one.status, first.status, second.status] == [1, 1, 1]


@pytest.mark.slow
def test_local_statistics_do_not(one: Ended, tmp_path: Path) -> None:
    first, second = run(2, tmp_path / "two", "--local")
    assert "not the same on all processes" in first.text
    assert first.status == second.status == 1
    assert abs(losses(first.text)[0] / losses(one.text)[0] - 1) > 1e-4


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    for rank in run(2, tmp_path / "two", "--batch-size", "31"):
        assert rank.status == 2
        assert "--batch-size must be a multiple of 2, the number of processes." in rank.text


@pytest.mark.slow
def test_the_command_in_the_documentation(tmp_path: Path) -> None:
    """mlx.launch itself ends with status 0 whatever its processes do, so what they print counts."""
    launch = Path(sys.executable).with_name("mlx.launch")
    if not launch.exists():
        pytest.skip("mlx.launch is not installed beside this Python.")
    (port,) = free_ports(1)
    command = [str(launch), "-n", "2", "--backend", "ring", "--starting-port", str(port), "--"]
    done = subprocess.run(
        [*command, sys.executable, str(SCRIPT), *SHORT],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert "processes                 2" in done.stdout, done.stderr
    assert "the same on all processes" in done.stdout
    assert "not the same" not in done.stdout


@pytest.mark.slow
def test_the_comparison(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "losses.png"
    assert train_distributed.main([*SHORT, "--output", str(path)]) == 0
    printed = capfd.readouterr().out
    assert matplotlib.image.imread(path).shape[:2] == (300, 600)
    rows = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("| ")]
    cells = {title.strip(): [cell.strip() for cell in found] for title, *found in rows}
    assert cells["the same training"] == list(train_distributed.PROCESSES)
    one, synchronised, local = map(float, cells["loss at the last step"])
    assert abs(synchronised - one) < 1e-5
    assert abs(local - one) > 1e-4
    memory = [float(text.removesuffix(" MiB")) for text in cells["peak memory of a step"]]
    assert max(memory[1:]) < 0.75 * memory[0]  # half of the batch
