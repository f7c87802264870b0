"""What of a report is worth keeping in the repository: one small file for each chip."""

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["publish"]

_FACTS = (
    "backend",
    "chip",
    "gpu_cores",
    "architecture",
    "memory_gib",
    "system",
    "system_build",
    "metal_language",
    "mlx_welford",
    "mlx",
    "shader_hash",
    "build",
)


def publish(report: dict[str, Any], folder: Path) -> Path:
    """Writes ``<chip>.json`` into the folder, which is made if there is none.

    Variables of the environment and the model of the machine are left out. A chip that comes with
    several numbers of GPU cores has a file for each.

    Returns:
        The file's path.

    Raises:
        ValueError: If the report is not finished, or has no times.
    """
    if not report["finished"] or not report["times"]:
        raise ValueError("[publish] a report must be finished and have times.")
    facts = report["status"]
    words = [facts["chip"], *([f"{facts['gpu_cores']} cores"] if facts["gpu_cores"] else [])]
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
    kept = {
        "date": report["date"][:10],
        **{name: facts[name] for name in _FACTS},
        "cases": len(report["cases"]),
        "cases_passed": sum(case["passed"] for case in report["cases"]),
        "programs": len(report["scenarios"]),
        "programs_passed": sum(s["passed"] for s in report["scenarios"]),
        "failed": [f"{c['case']} {c['dtype']}" for c in report["cases"] if not c["passed"]],
        "nominal_gigabytes_per_second": report["nominal_gigabytes_per_second"],
        "pipelines": report["pipelines"],
        "times": report["times"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path
