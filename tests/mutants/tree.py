"""A copy of the checkout that can be broken: its files, its environment, and how it is built."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from .data import ROOT, Mutant

PACKAGE = "mlx_welford"
BUILD_TIMEOUT = 600  # seconds


class BuildError(RuntimeError):
    """The mutated sources do not compile."""


def environment() -> dict[str, str]:
    """Without what an outer make hands down. Two threads, so that work is shared among some."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    # A file changed twice in a second would pass for the one that was compiled before.
    return {"MLX_WELFORD_NUM_THREADS": "2"} | inherited | {"PYTHONDONTWRITEBYTECODE": "1"}


class Tree:
    """The files that git tracks, with a .venv of hard links to all but the package's own files.

    Files get their times when they are first copied, or when they change: ninja compiles again what
    was changed, and nothing else.
    """

    def __init__(self, path: Path, root: Path = ROOT) -> None:
        self.path = path
        self.root = root
        self.planted: list[Mutant] = []

    def prepare(self) -> None:
        """Makes the copy, or brings the one that is there up to date, and builds it."""
        tracked = subprocess.run(
            ["git", "ls-files", "-z"], cwd=self.root, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        known = self.path / ".tracked"
        before = known.read_text().split("\0") if known.exists() else []
        for name in {*before} - {*tracked}:
            (self.path / name).unlink(missing_ok=True)
        for name in filter(None, tracked):
            source, target = self.root / name, self.path / name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
            elif target.read_bytes() != source.read_bytes():
                shutil.copyfile(source, target)  # a new time: a fault may have been compiled here
        known.write_text("\0".join(tracked))
        if not (self.path / ".venv").exists():
            self._link_environment()
        done = self._run(["make", "build"])
        if done.returncode != 0:
            raise BuildError(done.stdout)

    def _link_environment(self) -> None:
        source, target = self.root / ".venv", self.path / ".venv"
        ignore = shutil.ignore_patterns(f"{PACKAGE}*", "__pycache__", "*.stamp", "sources.txt")
        shutil.copytree(source, target, symlinks=True, ignore=ignore, copy_function=os.link)
        (target / "requirements.stamp").touch()  # they are there

    @property
    def python(self) -> str:
        return str(self.path / ".venv" / "bin" / "python")

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_TIMEOUT,
            check=False,
        )

    def plant(self, mutants: Sequence[Mutant]) -> None:
        """Makes these the faults of the tree, instead of those before, and builds what has changed.

        Raises BuildError, with the compiler's messages, if that is not possible.
        """
        texts: dict[str, str] = {}
        for file in {mutant.file for mutant in (*self.planted, *mutants)}:
            texts[file] = (self.root / file).read_text()
        for mutant in mutants:
            texts[mutant.file] = mutant.apply(texts[mutant.file])
        changed = False
        for file, text in texts.items():
            target = self.path / file
            if target.read_text() != text:
                target.write_text(text)
                changed = changed or not file.startswith("python/")
        self.planted = list(mutants)
        self._install_python(file for file in texts if file.startswith("python/"))
        if changed:
            self._build_extensions()

    def _site_packages(self) -> Path:
        (folder,) = (self.path / ".venv" / "lib").glob("python3*/site-packages")
        return folder

    def _install_python(self, files: Iterable[str]) -> None:
        for file in files:
            shutil.copy(self.path / file, self._site_packages() / Path(file).relative_to("python"))

    def _build_extensions(self) -> None:
        (folder,) = (path.parent for path in (self.path / "build").glob("*/build.ninja"))
        done = self._run(
            [self.python, "-m", "cmake", "--build", str(folder), "--target", "_core", "_ext"]
        )
        if done.returncode != 0:
            raise BuildError(done.stdout)
        layout = folder / "layout"
        for extension in (layout / PACKAGE).rglob("_*.so"):
            target = self._site_packages() / extension.relative_to(layout)
            target.unlink(missing_ok=True)
            shutil.copy(extension, target)
