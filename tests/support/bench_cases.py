"""Cases small enough for the tests of bench/, and figures made up for them."""

from collections.abc import Sequence

from mlx_welford.bench import harness, results, settings
from mlx_welford.bench.environment import environment
from mlx_welford.bench.harness import Samples
from mlx_welford.bench.implementations import BACKWARD, BASELINE, BOTH, COPY, FORWARD, OURS
from mlx_welford.bench.results import Row
from mlx_welford.bench.settings import AS_FOUND
from mlx_welford.bench.workloads import Case

MEBIBYTE = 2**20
TINY = Case("tiny", "Tiny", "BatchNorm", (2, 5, 3, 4), quick=True)
TINY_3D = Case("tiny-3d", "Tiny 3-D", "BatchNorm", (2, 3, 4, 5, 6), quick=True)
TINY_INSTANCE = Case("tiny-instance", "Tiny", "InstanceNorm", (2, 5, 3, 4))
TINY_PLAIN = Case("tiny-plain", "Tiny", "InstanceNorm", (2, 7, 4), affine=False)
TINY_FIRST = Case("tiny-first", "Tiny", "BatchNorm", (2, 4, 5, 3), axis=1)
TINY_INSTANCE_FIRST = Case("tiny-instance-first", "Tiny", "InstanceNorm", (2, 4, 5, 3), axis=1)
TINY_NC = Case("tiny-nc", "Tiny", "BatchNorm", (16, 4))
TINY_GROUP = Case("tiny-group", "Tiny", "GroupNorm", (2, 5, 3, 8), groups=4)
TINY_GROUP_FIRST = Case("tiny-group-first", "Tiny", "GroupNorm", (2, 6, 7), axis=1, groups=6)
TINY_INTERLEAVED = Case(
    "tiny-interleaved", "Tiny", "GroupNorm", (2, 5, 3, 6), groups=2, interleaved=True
)
TINY_RELU = Case("tiny-relu", "Tiny", "BatchNorm", (2, 5, 3, 4), activation="relu")
TINY_SUM = Case("tiny-sum", "Tiny", "InstanceNorm", (2, 5, 3, 4), residual=True)
TINY_SILU = Case(
    "tiny-silu", "Tiny", "BatchNorm", (2, 4, 5, 3), axis=1, activation="silu", residual=True
)
ALL_TINY = (
    TINY,
    TINY_3D,
    TINY_INSTANCE,
    TINY_PLAIN,
    TINY_FIRST,
    TINY_INSTANCE_FIRST,
    TINY_NC,
    TINY_GROUP,
    TINY_GROUP_FIRST,
    TINY_INTERLEAVED,
    TINY_RELU,
    TINY_SUM,
    TINY_SILU,
)


def not_counted(run: harness.Run) -> None:
    run()


def samples(*times: float, peak: int | None = None) -> Samples:
    return Samples(list(times), [] if peak is None else [peak], first=2 * times[0])


X_BYTES = 4 * TINY.elements

MEASURED = {
    (BASELINE, FORWARD): samples(12.0, 12.0, 13.0, peak=14 * X_BYTES),
    (OURS, FORWARD): samples(1.5, 1.0, 2.0, peak=X_BYTES),
    (BASELINE, BOTH): samples(36.0, 30.0, 40.0, peak=20 * X_BYTES),
    (OURS, BOTH): samples(4.5, 3.5, 5.5, peak=2 * X_BYTES),
    (COPY, COPY): samples(0.75, 0.5, 1.0, peak=0),
}


def rows_of(case: Case, modes: Sequence[str] = (FORWARD, BACKWARD, BOTH)) -> list[Row]:
    return results.rows(case, "float32", MEASURED, modes)


def described(setting: str = AS_FOUND, threads: int = 2) -> dict[str, str | int | float | None]:
    tuned = settings.description(setting)
    return {**environment(), "setting": setting, "tuned": tuned, "threads": threads}
