"""Files of golden/: how a layer was made, and arrays by name; and a layer's step, to compare."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from reference import Array


class Record:
    def __init__(self, path: Path):
        with np.load(path) as arrays:
            self.meta: dict[str, Any] = json.loads(str(arrays["meta"]))
            self.arrays = {name: arrays[name] for name in arrays.files if name != "meta"}
        self.kwargs: dict[str, Any] = self.meta["kwargs"]

    def __getitem__(self, name: str) -> Array:
        array: Array = self.arrays[name]
        return array


def describe(path: Path) -> str:
    meta = Record(path).meta
    options = ",".join(f"{k}={v}" for k, v in meta["kwargs"].items())
    return f"{meta['cls'].split('.')[-1]}({options})-{'x'.join(map(str, meta['shape']))}"


def step_of(layer: nn.Module, x: mx.array, gy: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
    """y, and the gradients by name, for a cotangent."""
    names = [name for name in ("weight", "bias") if name in layer]

    def f(x: mx.array, *parameters: mx.array) -> list[mx.array]:
        layer.update(dict(zip(names, parameters, strict=True)))
        return [layer(x)]

    primals = [x, *(layer[name] for name in names)]
    (y,), grads = mx.vjp(f, primals, [gy])
    layer.update(dict(zip(names, primals[1:], strict=True)))
    return y, dict(zip(["x", *names], grads, strict=True))
