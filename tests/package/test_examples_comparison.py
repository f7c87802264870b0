"""The comparison and the table that the examples share."""

import re
from typing import Any

import comparison
import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from comparison import VARIANTS, Steps, compare, largest_distance
from mlx.utils import tree_flatten
from rich.console import Console


def loss(model: nn.Module, x: mx.array) -> mx.array:
    noise = mx.random.normal(x.shape)
    result: mx.array = ((model(x) - noise) ** 2).mean()
    return result


def test_all_variants_compute_the_same_steps() -> None:
    model: nn.Module = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm(3), nn.ReLU())
    before = dict(tree_flatten(model.trainable_parameters()))
    seen = []

    def watched(*arguments: mx.array) -> Any:
        seen.append([type(layer) for layer in model.layers])
        return nn.value_and_grad(model, loss)(*arguments)

    batches = [(mx.random.normal((2, 8, 8, 3)),) for _ in range(2)]
    compared = compare(model, watched, batches)
    assert list(compared) == list(VARIANTS)
    for steps in compared.values():
        assert len(steps.seconds) == len(steps.memory) == len(steps.losses) == 2
        assert steps.losses[0] != steps.losses[1]
        assert min(steps.memory) >= 4 * batches[0][0].size
        assert largest_distance(steps, compared["mlx.nn"]) < 1e-5

    # Each is called twice, for memory and for time.
    classes = seen[:6:2]
    assert [kinds[1] for kinds in classes] == [nn.BatchNorm, mw.BatchNorm, mw.BatchNorm]
    assert [kinds[2] is nn.ReLU for kinds in classes] == [True, True, False]
    assert seen == 2 * [kinds for kinds in classes for _ in range(2)]
    # Nothing is trained, and the model is as it was.
    assert type(model.layers[1]) is nn.BatchNorm
    after = dict(tree_flatten(model.trainable_parameters()))
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


def test_layers_that_cannot_be_swapped_are_an_error() -> None:
    model: nn.Module = nn.Sequential(mw.BatchNorm(3))
    with pytest.raises(ValueError, match=r"must be those of mlx\.nn"):
        compare(model, nn.value_and_grad(model, loss), [])


def test_memory_does_not_depend_on_how_far_allocations_run_ahead() -> None:
    x = mx.ones(2**20)
    limit = mx.set_memory_limit(2**40)

    def step() -> None:
        y = x
        for _ in range(30):
            y = mx.cumsum(y)  # into another array; needs two at a time
        mx.eval(y)

    assert 2 * x.nbytes <= comparison.memory(step) < 15 * x.nbytes
    assert mx.set_memory_limit(limit) == 2**40


def test_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    compared = {
        "mlx.nn": Steps([1.0, 2.0], [0.001, 0.003], [2**20, 2**20]),
        "mlx_welford": Steps([1.5, 2.25], [0.002, 0.002], [2**19, 2**19]),
    }
    Console().print(comparison.table(compared))
    lines = [
        re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    assert lines[1].strip("|- ") == ""
    assert lines[2] == "| median time | 2.0 ms | 2.0 ms |"
    assert lines[3] == "| memory | 1.0 MiB | 0.5 MiB |"
    assert lines[4] == "| loss, distance | 0 | 0.5 |"
