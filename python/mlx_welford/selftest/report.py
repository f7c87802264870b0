"""Runs the whole self-test, and puts what it found into words."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_welford import _ext
from mlx_welford._text import table
from mlx_welford.dispatches import kernels
from mlx_welford.selftest.cases import CASES, Case, coverage
from mlx_welford.selftest.check import Outcome, check
from mlx_welford.selftest.chips import nominal_bandwidth
from mlx_welford.selftest.times import LAYERS, QUICK_LAYERS, measure
from mlx_welford.status import describe, status

__all__ = ["run", "to_text"]


def run(
    *,
    cases: Sequence[Case] = CASES,
    times: bool = True,
    quick: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Runs the self-test on the default device.

    Args:
        cases: The problems to solve. Default: all.
        times: Whether to compare times with mlx.nn. Default: ``True``.
        quick: Whether to time fewer layers for a shorter time. Default: ``False``.
        progress: Called with a line before each part that takes a while.

    Returns:
        A dictionary ready for JSON: ``status``, ``passed``, ``failures``, ``cases`` (of each the
        results with errors and allowed errors, and the kernels in its plan),
        ``kernels_in_no_plan`` and ``times``. Errors that are not finite are strings.
    """
    progress(f"{len(cases)} cases against float64")
    outcomes = [check(case) for case in cases]
    rows = []
    if times:
        # mlx.nn in 16 bits takes minutes on a CPU.
        dtypes = ("float32", "float16") if mx.default_device() == mx.gpu else ("float32",)
        for timed in QUICK_LAYERS if quick else LAYERS:
            for dtype in dtypes:
                progress(f"times of {timed.model}, {dtype}")
                rows += measure(timed, dtype, seconds=0.2 if quick else 1.0)
    failures = sum(not outcome.passed for outcome in outcomes)
    everything = {name for name, _ in _ext.shader_kernels()}
    return {
        "status": status(),
        "passed": failures == 0,
        "failures": failures,
        "cases": [_to_dict(outcome) for outcome in outcomes],
        "kernels_in_no_plan": sorted(everything - coverage(cases)),
        "times": rows,
    }


def to_text(report: dict[str, Any]) -> str:
    """The report as plain text."""
    blocks = [describe(report["status"]), _cases(report["cases"])]
    if report["times"]:
        blocks.append(_times(report["times"], report["status"]["device_name"]))
    return "\n\n".join([*blocks, _summary(report)])


def _to_dict(outcome: Outcome) -> dict[str, Any]:
    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    results = [
        {
            "name": result.name,
            "error": number(result.error),
            "allowed": result.allowed,
            "passed": result.passed,
        }
        for result in outcome.results
    ]
    return {
        "case": str(outcome.case),
        "dtype": outcome.case.dtype,
        "passed": outcome.passed,
        "raised": outcome.raised,
        "worst": outcome.worst.name if outcome.results else None,
        "results": results,
        "kernels": kernels(outcome.case.plans),
    }


def _cases(cases: list[dict[str, Any]]) -> str:
    """A line per case with the result that comes closest to the allowed error, or exceeds it."""
    rows = [("", "case", "dtype", "worst", "error", "allowed", "kernels of its launch plan")]
    notes = []
    for case in cases:
        results = {result["name"]: result for result in case["results"]}
        worst = results.get(case["worst"], {"name": "raised", "error": "", "allowed": ""})
        error, allowed = (_number(worst[key]) for key in ("error", "allowed"))
        mark = "ok" if case["passed"] else "FAIL"
        rows.append(
            (mark, case["case"], case["dtype"], worst["name"], error, allowed, _short(case))
        )
        if case["raised"]:
            notes.append(f"{case['case']} {case['dtype']}: {case['raised']}")
        notes += [
            f"{case['case']} {case['dtype']}: {r['name']} is off by {_number(r['error'])}, "
            f"allowed are {_number(r['allowed'])}"
            for r in case["results"]
            if not r["passed"]
        ]
    return "\n".join([table(rows, numbers=(4, 5)), *notes])


def _short(case: dict[str, Any]) -> str:
    """The kernels, with what their instantiations have in common said once."""
    names = case["kernels"]
    walking = next((name for name in names if name.endswith(("_Rows", "_Columns"))), None)
    if walking is None:
        return " ".join(names)
    element, width, pattern = walking.split("_")[-3:]
    plain = [
        name.removesuffix(f"_{element}_{width}_{pattern}").removesuffix(f"_{element}")
        for name in names
    ]
    return f"{element}_{width}_{pattern}: {' '.join(plain)}"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1e}"


def _times(rows: list[dict[str, Any]], device: str) -> str:
    """Milliseconds are medians; GB/s are the bytes that the launch plan moves, per our time."""
    lines = [("", "shape", "dtype", "mode", "mlx.nn ms", "ours ms", "times as fast", "GB/s")]
    lines += [
        (
            row["model"],
            "x".join(map(str, row["shape"])),
            row["dtype"],
            row["mode"],
            f"{row['mlx_nn_ms']:.2f}",
            f"{row['mlx_welford_ms']:.2f}",
            f"{row['times_as_fast']:.1f}",
            f"{row['gigabytes_per_second']:.1f}",
        )
        for row in rows
    ]
    caption = "medians of runs by turns; GB/s: what the launch plan reads and writes, by our time"
    nominal = nominal_bandwidth(device)
    if nominal is not None:
        caption += f"; {device} has {nominal:g} GB/s by its data sheet"
    return table(lines, numbers=(4, 5, 6, 7)) + "\n" + caption


def _summary(report: dict[str, Any]) -> str:
    total = len(report["cases"])
    lines = [
        f"{total - report['failures']} of {total} cases passed on the backend "
        f"'{report['status']['backend']}' ({report['status']['device_name']})."
    ]
    absent = report["kernels_in_no_plan"]
    lines.append(
        f"kernels in no case's launch plan: {', '.join(absent) if absent else 'none'} "
        f"(of {report['status']['shader_kernels']})"
    )
    return "\n".join(lines)
