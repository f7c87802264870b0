"""Runs the whole self-test, puts what it found into words, and keeps it through a crash.

The report is a dictionary that grows. Each case is named, in the text and in the file, before it
runs: after a crash both end with the one that caused it.
"""

import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_welford as mw
from mlx_welford._operations import operations
from mlx_welford._plans import Plans, dispatches, kernels
from mlx_welford._status import describe, of_machine, of_shaders
from mlx_welford._text import table
from mlx_welford.selftest.cases import CASES, Case, coverage
from mlx_welford.selftest.check import REPEATS, Outcome, Result, Used, check
from mlx_welford.selftest.chips import nominal_bandwidth
from mlx_welford.selftest.scenarios import SCENARIOS, ScenarioOutcome, check_scenario
from mlx_welford.selftest.times import LAYERS, QUICK_LAYERS, measure

__all__ = ["LIMIT", "run", "to_text", "write_json"]

LIMIT = 60_000
"""Characters of the text: an issue on GitHub holds 65,536."""

SHORT = 200  # what is longer, or has several lines, is a log
# What fails everywhere must leave room for the compiler's logs: characters after which cases are
# told in few words, and characters that the table of pipelines leaves to the logs.
VERBOSE = 14_000
LEFT_TO_LOGS = 15_000
MOST_LOGS = 12

VALIDATE = "MTL_DEBUG_LAYER=1 MTL_SHADER_VALIDATION=1 python -m mlx_welford selftest --no-times"

Report = dict[str, Any]


def run(
    *,
    cases: Sequence[Case] = CASES,
    scenarios: Iterable[str] = tuple(SCENARIOS),
    times: bool = True,
    quick: bool = False,
    repeats: int = REPEATS,
    write: Callable[[str], None] = lambda text: None,
    save: Callable[[Report], None] = lambda report: None,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs the self-test on the default device.

    Args:
        cases: The problems to solve. Default: all.
        scenarios: Names of programs to run. Default: all.
        times: Whether to compare times with mlx.nn. Default: ``True``.
        quick: Whether to time fewer layers for a shorter time. Default: ``False``.
        repeats: How often each case runs. Default: 20.
        write: Called with the text, piece by piece as it comes; all pieces are ``to_text``'s.
        save: Called with the report so far, before and after each part.
        progress: Called with a line before each part that takes a while and writes nothing.

    Returns:
        A dictionary ready for JSON: ``status``, ``passed``, ``failures``, ``cases`` (of each the
        results with errors and allowed errors, the kernels in its plan, and the dispatches that
        really ran), ``scenarios``, ``pipelines``, ``times``, ``kernels_in_no_plan``, ``logs`` (what
        was raised, if it is long, once each), and ``running``: what was begun and has not ended.
        Errors that are not finite are strings.
    """
    report: Report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": False,
        "running": "",
        "status": of_machine(),
        "passed": False,
        "failures": 0,
        "cases": [],
        "scenarios": [],
        "pipelines": {},
        "times": [],
        "nominal_gigabytes_per_second": None,
        "raised_in_times": [],
        "backend_of_times": None,
        "kernels_in_no_plan": [],
        "logs": [],
    }

    def begin(name: str) -> None:
        report["running"] = name
        report["pipelines"] = {
            kernel: {"threads": threads, "threadgroup_bytes": size, "milliseconds": ms}
            for kernel, (threads, size, ms) in operations.pipelines().items()
        }
        save(report)

    written = 0

    def tell(text: str) -> None:
        nonlocal written
        written += len(text)
        write(text)

    tell(_machine_words(report))
    begin("the first kernels, for the status")
    facts = report["status"]
    facts |= of_shaders()
    if facts["shaders_compile"] is False:
        facts["shaders"] = _intern(report, "they do not compile", facts["shaders"])
    tell(_shader_words(report))
    report["nominal_gigabytes_per_second"] = nominal_bandwidth(facts["chip"], facts["gpu_cores"])
    everything = {name for name, _ in operations.shader_kernels()}
    report["kernels_in_no_plan"] = sorted(everything - coverage(cases))

    for case in cases:
        name = f"{case} {case.dtype}"
        tell(f"{name}: ")
        begin(name)
        outcome = check(case, repeats)
        report["cases"].append(_case(report, outcome))
        report["failures"] += not outcome.passed
        tell(_case_words(report["cases"][-1], brief=written > VERBOSE) + "\n")
    tell(_SCENARIOS)
    for name in scenarios:
        tell(f"{name}: ")
        begin(name)
        found = _scenario(report, check_scenario(name))
        composed = _scenario(report, check_scenario(name, composed=True))
        report["scenarios"].append({**found, "composed": composed})
        report["failures"] += not (found["passed"] and composed["passed"])
        tell(_scenario_words(report["scenarios"][-1]) + "\n")
    if times and everything:  # of kernels
        # mlx.nn in 16 bits takes minutes on a CPU.
        dtypes = ("float32", "float16") if mx.default_device() == mx.gpu else ("float32",)
        for timed in QUICK_LAYERS if quick else LAYERS:
            for dtype in dtypes:
                name = f"times of {timed.model}, {dtype}"
                progress(name)
                begin(name)
                try:
                    report["times"] += measure(timed, dtype, seconds=0.2 if quick else 1.0)
                except Exception as raised:  # memory may not suffice
                    words = _intern(report, type(raised).__name__, str(raised))
                    report["raised_in_times"].append(f"{name}: {words}")
                    report["failures"] += 1
        report["backend_of_times"] = operations.backend()
    report["finished"] = True
    report["passed"] = report["failures"] == 0
    begin("")
    tell(_rest(report, written))
    return report


def to_text(report: Report) -> str:
    """The report as plain text, below ``LIMIT`` characters; of a run that did not end as well."""
    text = _machine_words(report)
    if "shaders" in report["status"]:
        text += _shader_words(report)
    for case in report["cases"]:
        text += f"{case['case']} {case['dtype']}: "
        text += _case_words(case, brief=len(text) > VERBOSE) + "\n"
    if report["finished"] or report["scenarios"]:
        text += _SCENARIOS
    for scenario in report["scenarios"]:
        text += f"{scenario['scenario']}: {_scenario_words(scenario)}\n"
    return text + _rest(report, len(text))


def write_json(report: Report, path: Path) -> None:
    """Puts the report in the file's place at once, and onto the disk: the system may crash, too."""
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(report, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# The report


def _intern(report: Report, kind: str, message: str) -> str:
    """What was raised, if it is short; else what matters of it, after it was put among the logs."""
    message = message.strip()
    if len(message) <= SHORT and "\n" not in message:
        return f"{kind}: {message}"
    if message not in report["logs"]:
        report["logs"].append(message)
    lines = message.splitlines()
    error = next((line for line in lines[1:] if "error" in line.lower()), lines[0])
    return f"{kind}, log {report['logs'].index(message) + 1}: {error.strip()[:SHORT]}"


def _raised(report: Report, raised: str | None) -> str | None:
    if raised is None:
        return None
    kind, _, message = raised.partition(": ")
    return _intern(report, kind, message)


def _results(results: Iterable[Result]) -> list[dict[str, Any]]:
    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    return [
        {
            "name": result.name,
            "error": number(result.error),
            "allowed": result.allowed,
            "passed": result.passed,
        }
        for result in results
    ]


def _case(report: Report, outcome: Outcome) -> dict[str, Any]:
    composed = None
    if not outcome.passed:
        # Composed of MLX's own operations: if that fails as well, the kernels are hardly to blame.
        with mw.composed():
            composed = check(outcome.case, 1).passed
    return {
        "case": str(outcome.case),
        "dtype": outcome.case.dtype,
        "passed": outcome.passed,
        "raised": _raised(report, outcome.raised),
        "worst": outcome.worst.name if outcome.results else None,
        "results": _results(outcome.results),
        "composed_passed": composed,
        "kernels": kernels(outcome.case.plans),
        "kernels_in_short": _short(outcome.case.plans),
        "used": [used._asdict() for used in outcome.used],
        "unplanned": _unplanned(outcome.case.plans, outcome.used),
    }


def _unplanned(plans: Plans, used: Iterable[Used]) -> list[str]:
    """Dispatches that ran and are not in the plan for pipelines that allow as much as the GPU."""
    planned = {(d["pipeline"], d["threadgroups"], d["threads"]) for d in dispatches(plans)}
    others = [d for d in used if d not in planned]
    return [f"{d.kernel} {d.threadgroups} x {d.threads}" for d in dict.fromkeys(others)]


def _short(plans: Plans) -> str:
    """The kernels, with what their instantiations have in common said once."""
    names = {d["kernel"]: d["function"] for d in dispatches(plans)}
    walking = next((d for d in dispatches(plans) if d["pattern"]), None)
    if walking is None:
        return " ".join(names)
    common = walking["kernel"].removeprefix(f"{walking['function']}_")
    return f"{common}: {' '.join(names.values())}"


def _scenario(report: Report, outcome: ScenarioOutcome) -> dict[str, Any]:
    return {
        "scenario": outcome.name,
        "passed": outcome.passed,
        "raised": _raised(report, outcome.raised),
        "left_out": outcome.left_out,
        "worst": outcome.worst.name if outcome.results else None,
        "results": _results(outcome.results),
    }


# Its words


_OF_SHADERS = ("metal_language", "shaders_compile", "shaders")
_CASES = "cases: the result closest to its allowed error, or beyond it; kernels of the launch plan"
_SCENARIOS = "\nprograms, on the kernels and composed of MLX's own operations:\n"


def _machine_words(report: Report) -> str:
    facts = {name: v for name, v in report["status"].items() if name not in _OF_SHADERS}
    return f"mlx_welford selftest, {report['date']}\n{describe(facts)}\n"


def _shader_words(report: Report) -> str:
    lines = describe(report["status"]).splitlines(keepends=True)  # aligned with those before
    return f"{''.join(lines[-len(_OF_SHADERS) :])}\n\n{_CASES}\n"


def _worst(found: dict[str, Any]) -> str:
    """The result that comes closest to its allowed error; after a failure, all beyond it."""
    results = {result["name"]: result for result in found["results"]}
    wrong = [result for result in found["results"] if not result["passed"]]
    parts = [
        f"{r['name']} {_number(r['error'])} of {_number(r['allowed'])}"
        for r in wrong or [results[found["worst"]]]
    ]
    return ", ".join(parts)


def _words(found: dict[str, Any]) -> str:
    if found["raised"] is not None:
        return f"FAIL  {found['raised']}"
    if not found["results"]:
        return f"not run: {found['left_out']}"
    return f"{'ok' if found['passed'] else 'FAIL'}  {_worst(found)}"


def _case_words(case: dict[str, Any], *, brief: bool) -> str:
    words = _words(case)
    if brief:
        words = "ok" if case["passed"] else textwrap.shorten(words, 80, placeholder=" ...")
    if case["composed_passed"] is not None:
        how = "composed" if brief else "composed of MLX's operations"
        words += f"; {how} {_passes(case['composed_passed'])}"
    if brief:
        return words
    if case["kernels"]:
        words += f"; {case['kernels_in_short']}"
    if case["unplanned"]:
        ran = ", ".join(case["unplanned"])
        words += f"; ran instead: {textwrap.shorten(ran, 300, placeholder=' ...')}"
    return words


def _scenario_words(scenario: dict[str, Any]) -> str:
    return f"{_words(scenario)}; composed: {_words(scenario['composed'])}"


def _passes(passed: bool) -> str:
    return "it passes" if passed else "it fails, too"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1e}" if value else "0"


def _rest(report: Report, before: int) -> str:
    """What follows the programs, in the room that is left after `before` characters."""
    blocks = []
    if not report["finished"]:
        blocks.append(f"stopped at: {report['running']}")
    if report["times"]:
        blocks.append(_times(report))
    if report["raised_in_times"]:
        blocks.append("\n".join(report["raised_in_times"]))
    summary = _summary(report)
    room = LIMIT - before - sum(len(block) + 2 for block in blocks) - len(summary) - 5
    if report["pipelines"]:
        pipelines = _pipelines(report["pipelines"])
        blocks.append(_cut(pipelines, max(room - LEFT_TO_LOGS * bool(report["logs"]), 0)))
        room -= len(blocks[-1]) + 2
    if report["logs"]:
        blocks.append(_logs(report["logs"], room))
    return "\n" + "\n\n".join([*blocks, summary])


def _pipelines(pipelines: dict[str, dict[str, Any]]) -> str:
    rows = [("pipeline", "threads allowed", "threadgroup bytes", "ms to make it")]
    rows += [
        (kernel, str(p["threads"]), str(p["threadgroup_bytes"]), f"{p['milliseconds']:.1f}")
        for kernel, p in pipelines.items()
    ]
    return table(rows, numbers=(1, 2, 3))


def _times(report: Report) -> str:
    nominal = report["nominal_gigabytes_per_second"]
    head = ("", "shape", "dtype", "mode", "mlx.nn ms", "ours ms", "times as fast", "copy ms")
    lines = [(*head, "GB/s", "of copy", *(["of nominal"] if nominal else []))]
    for row in report["times"]:
        speed = row["gigabytes_per_second"]
        figures = [row["mlx_nn_ms"], row["mlx_welford_ms"], row["times_as_fast"], row["copy_ms"]]
        lines.append(
            (
                row["model"],
                "x".join(map(str, row["shape"])),
                row["dtype"],
                row["mode"],
                *(f"{value:.3g}" for value in figures),
                f"{speed:.3g}",
                f"{row['share_of_copy']:.0%}",
                *([f"{speed / nominal:.0%}"] if nominal else []),
            )
        )
    caption = (
        "medians of runs by turns; ms of one application, of many in one evaluation, less an empty "
        "one\nGB/s: what the launch plan reads and writes, by our time; the copy reads and writes x"
    )
    if nominal:
        caption += (
            f"\n{report['status']['chip']} has {nominal:g} GB/s by its data sheet; "
            "small arrays stay in its cache"
        )
    if report["backend_of_times"] == "composed":
        caption += "\nthese are times of MLX's own operations, since a shader does not compile"
    return table(lines, numbers=tuple(range(4, len(head) + 3))) + "\n" + caption


def _logs(logs: Sequence[str], room: int) -> str:
    """The logs, each as long as there is room for: the longest are cut to one length."""
    shown = logs[:MOST_LOGS]
    headings = [f"log {i} ({len(log):,} characters):\n" for i, log in enumerate(shown, 1)]
    more = f"\n\n{len(logs) - MOST_LOGS} more logs are in the JSON file" * (len(logs) > MOST_LOGS)
    room -= len(more) + sum(len(heading) + 2 for heading in headings)
    most = max(map(len, shown))
    while most > 0 and sum(min(len(log), most) for log in shown) > room:
        most = most * 9 // 10
    parts = [heading + _cut(log, most) for heading, log in zip(headings, shown, strict=True)]
    return "\n\n".join(parts) + more


def _cut(text: str, most: int) -> str:
    """The text, with its middle left out if it is longer than `most`."""
    if len(text) <= most:
        return text
    note = (
        f"\n[... of {len(text):,} characters the middle is left out; all is in the JSON file ...]\n"
    )
    half = (most - len(note)) // 2
    if half <= 0:
        return note.strip()[: max(most, 0)]
    return text[:half] + note + text[-half:]


def _summary(report: Report) -> str:
    cases, scenarios = report["cases"], report["scenarios"]
    facts = report["status"]
    passed = sum(case["passed"] for case in cases)
    ran = [s for s in scenarios if not s["left_out"]]
    good = sum(s["passed"] and s["composed"]["passed"] for s in ran)
    absent = report["kernels_in_no_plan"]
    lines = [
        f"{passed} of {len(cases)} cases and {good} of {len(ran)} programs passed on the backend "
        f"'{facts['backend']}' ({facts['device_name']}).",
        f"kernels in no case's launch plan: {', '.join(absent) if absent else 'none'} "
        f"(of {facts['shader_kernels']})",
    ]
    if (report["failures"] or not report["finished"]) and facts["device"] == "gpu":
        lines.append(
            "Something failed. Metal can tell more: please run this too, and add what it prints:"
            f"\n    {VALIDATE}"
        )
    return "\n".join(lines)
