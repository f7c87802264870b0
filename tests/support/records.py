"""Files of golden/: how a layer was made, and arrays by name."""

import json
from pathlib import Path
from typing import Any

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
