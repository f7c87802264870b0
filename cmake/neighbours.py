"""Which projects this package can be installed beside: python cmake/neighbours.py

For each, uv (pip install uv) resolves its requirements together with that of the wheels on mlx, for
a Mac. The result is written into docs/building.md.
"""

import os
import re
import subprocess
import sys

from pins import OLDEST
from try_releases import fill

# Published projects that normalise, some with a pin of mlx; the releases that were read.
PROJECTS = (
    "demucs-mlx==1.6.1",
    "kokoro-mlx==0.1.4",
    "mflux==0.24.0",
    "mlx-audio==0.6.2",
    "mlx-audio-separator==0.1.20",
    "mlx-graphs==0.0.10",
    "mlx-image==0.1.10",
    "mlx-vlm==0.7.10",
    "nnunet-mlx==0.5.1",
    "yolo-mlx==0.4.0",
)
UV = (
    *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"),
    *("--python-version", "3.13", "--python-platform", "aarch64-apple-darwin", "-"),
)


def resolved(project: str) -> str:
    """The release of mlx that both can have, or why there is none."""
    done = subprocess.run(
        UV,
        input=f"mlx>={OLDEST}\n{project}\n",
        env=os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        (release,) = re.findall(r"^mlx==(\S+)", done.stdout, re.MULTILINE)
        return f"mlx {release}"
    said = " ".join(done.stderr.split())
    pin = re.search(r"depends on mlx(?:{[^}]*})?([<=>]\S*)", said)
    return f"none: it needs `mlx{pin[1]}`" if pin else f"none: {said}"


if __name__ == "__main__":
    lines = ["| project | both can have |", "|---|---|"]
    lines += [f"| {project.replace('==', ' ')} | {resolved(project)} |" for project in PROJECTS]
    fill("neighbours", "\n".join(lines))
