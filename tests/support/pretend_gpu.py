"""A pytest plugin: the tests of the GPU on a machine without one, to see which ask for too much.

``python -m pytest -p pretend_gpu --backend gpu`` runs on the CPU what a Mac would run on its GPU,
with three of the differences:

- There is no float64. MLX refuses operations on it on a GPU; here making an array of it fails.
  Other uses of mx.float64, such as comparing dtypes, are allowed.
- The arrays that were evaluated last are held until mx.synchronize is called, as completion
  handlers on a GPU may hold them.
- The GPU is the default device until another one is chosen.
"""

from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from mlx_welford.selftest import truth


class Float64IsRefused:
    """Takes the place of mx.float64. MLX raises a TypeError for it, with this name in the text."""


class _Device:
    """What mx.set_default_device was given last."""

    def __init__(self) -> None:
        self.is_gpu = True
        self._set = mx.set_default_device

    def choose(self, device: Any) -> None:
        self.is_gpu = device is mx.gpu
        self._set(device)


class _Memory:
    """What was evaluated last."""

    def __init__(self) -> None:
        self._held: tuple[object, ...] = ()
        self._eval, self._synchronize = mx.eval, mx.synchronize

    def eval(self, *trees: Any) -> None:
        self._eval(*trees)
        self._held = tuple(_leaves(trees))

    def synchronize(self, *streams: Any) -> None:
        self._synchronize(*streams)
        self._held = ()


def _leaves(tree: Any) -> list[object]:
    """The arrays, in whose place a container may soon hold others."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [leaf for branch in tree for leaf in _leaves(branch)]
    return [tree]


def _copy(module: ModuleType) -> ModuleType:
    copy = ModuleType(module.__name__)
    vars(copy).update(vars(module))
    return copy


# The self-test computes its truth on a stream of the CPU, where there is float64.
vars(truth)["mx"] = _copy(mx)

device, _memory = _Device(), _Memory()
vars(mx).update(
    gpu=mx.Device(mx.cpu, 0),
    float64=Float64IsRefused(),
    set_default_device=device.choose,
    eval=_memory.eval,
    synchronize=_memory.synchronize,
)
vars(mx.metal)["is_available"] = lambda: True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only tests that take a backend: the others run on the CPU, float64 or not."""
    others = [item for item in items if item.get_closest_marker("every_backend") is None]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item.get_closest_marker("every_backend")]
