"""The figures of a comparison, their ratios, and the JSON file with both."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mlx_welford._plans import DTYPES, Layer, normalization_plans, traffic

from .environment import Environment
from .harness import Figures, Samples, net
from .implementations import BACKWARD, BASELINE, BOTH, COPY, EVALUATION, FORWARD, Key, note
from .workloads import Case, Norm

SCHEMA = 4
"""Version of the file format; changes when fields change their names or meanings."""


@dataclass(frozen=True)
class Row:
    """One implementation in one case, dtype and mode."""

    case: str
    model: str
    norm: str
    shape: tuple[int, ...]
    channels_last: bool
    groups: int  # 0 but for a GroupNorm
    interleaved: bool
    dtype: str
    mode: str
    implementation: str
    figures: Figures
    x_bytes: int
    copies: float  # time, relative to copying x
    speed: float | None  # mlx.nn's time by this time, if mlx.nn was measured
    memory: float | None  # peak above the inputs in sizes of x, if known
    moved_bytes: int  # bytes of arrays of the size of x that the operation reads and writes
    gigabytes_per_second: float  # moved_bytes by the time
    note: str

    @property
    def limit(self) -> float:
        """The least time, in copies of x: this traffic at the bandwidth of a copy."""
        return self.moved_bytes / (2 * self.x_bytes)


def rows(case: Case, dtype: str, samples: Mapping[Key, Samples], modes: Sequence[str]) -> list[Row]:
    """A row for each mode and implementation, with ratios; the copy is the last."""
    figures = {key: of_key.figures() for key, of_key in samples.items()}
    for name in dict.fromkeys(name for name, _ in samples):
        if (name, FORWARD) in samples and (name, BOTH) in samples:
            figures[name, BACKWARD] = net(samples[name, BOTH], samples[name, FORWARD])
    x_bytes = case.elements * DTYPES[dtype].size
    copy = figures[COPY, COPY].milliseconds

    def row(name: str, mode: str) -> Row:
        own = figures[name, mode]
        baseline = figures.get((BASELINE, mode))
        moved = 2 * x_bytes if mode == COPY else moved_bytes(case, dtype, mode)
        return Row(
            case=case.name,
            model=case.model,
            norm=case.norm,
            shape=case.shape,
            channels_last=case.channels_last,
            groups=case.groups,
            interleaved=case.interleaved,
            dtype=dtype,
            mode=mode,
            implementation=name,
            figures=own,
            x_bytes=x_bytes,
            copies=own.milliseconds / copy,
            speed=None if baseline is None else baseline.milliseconds / own.milliseconds,
            memory=None if own.peak_bytes is None else own.peak_bytes / x_bytes,
            moved_bytes=moved,
            gigabytes_per_second=moved / own.milliseconds / 1e6,
            note=note(case, name),
        )

    order = [*modes, COPY]
    keys = sorted((key for key in figures if key[1] in order), key=lambda key: order.index(key[1]))
    return [row(*key) for key in keys]


LAYERS: dict[Norm, Layer] = {
    "BatchNorm": "batch",
    "InstanceNorm": "instance",
    "GroupNorm": "group",
}
"""What launch plans call the layers."""


def moved_bytes(case: Case, dtype: str, mode: str) -> int:
    """Bytes that the operation's launch plan reads and writes, without small arrays."""
    if mode == BACKWARD:
        return moved_bytes(case, dtype, BOTH) - moved_bytes(case, dtype, FORWARD)
    plans = normalization_plans(
        LAYERS[case.norm],
        case.shape,
        axis=case.axis,
        dtype=dtype,
        weight=case.affine,
        bias=case.affine,
        given=mode == EVALUATION,
        groups=case.groups,
        interleaved=case.interleaved,
        wanted=("x", "weight", "bias") if mode == BOTH else (),
        activation=case.activation,
        residual=case.residual,
    )
    return traffic(plans, case.elements * DTYPES[dtype].size)


@dataclass(frozen=True)
class Report:
    environment: Environment
    rows: list[Row]
    left_out: tuple[str, ...] = ()  # what was not measured, and why

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> "Report":
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"[Report] '{path.name}' must have schema {SCHEMA} but got {data.get('schema')}."
            )
        return Report(
            data["environment"],
            [
                Row(**{**row, "shape": tuple(row["shape"]), "figures": Figures(**row["figures"])})
                for row in data["rows"]
            ],
            tuple(data["left_out"]),
        )

    def only(self, **fields: object) -> "Report":
        """The rows whose fields have these values."""
        chosen = [row for row in self.rows if all(getattr(row, f) == v for f, v in fields.items())]
        return replace(self, rows=chosen)
