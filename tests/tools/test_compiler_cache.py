"""What is compiled once for several wheels is what would have been compiled for each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import compiler_cache
import pytest

COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here")

SOURCE = """
#include "answer.h"
#ifndef STEP
#define STEP 1
#endif
int answer() { return ANSWER + STEP; }
"""


class Project:
    """A source and a header in a folder, and a cache that other projects may share."""

    def __init__(self, folder: Path, cache: Path, answer: int = 41) -> None:
        self.folder, self.cache = folder, cache
        folder.mkdir()
        (folder / "source.cpp").write_text(SOURCE)
        (folder / "answer.h").write_text(f"#define ANSWER {answer}\n")

    def compile(self, *options: str, source: str = "source.cpp") -> bytes:
        """The object; it is removed, and the list of headers checked."""
        result, headers = self.folder / "source.o", self.folder / "source.d"
        command = [str(COMPILER), f"-I{self.folder}", *options]
        command += ["-MD", "-MT", "source.o", "-MF", str(headers), "-o", str(result)]
        command += ["-c", str(self.folder / source)]
        script = [sys.executable, compiler_cache.__file__, str(self.cache)]
        subprocess.run([*script, *command], check=True, capture_output=True)
        assert str(self.folder / "answer.h") in headers.read_text()
        found = result.read_bytes()
        result.unlink()
        return found

    @property
    def compiled(self) -> int:
        return len(list(self.cache.iterdir()))


def test_the_same_text_is_compiled_once_wherever_it_lies(tmp_path: Path) -> None:
    one, two = (Project(tmp_path / name, tmp_path / "cache") for name in ("one", "two"))
    first = one.compile("-O1")
    kept = {path: path.stat().st_mtime_ns for path in one.cache.iterdir()}
    assert two.compile("-O1") == first
    assert {path: path.stat().st_mtime_ns for path in one.cache.iterdir()} == kept
    assert len(kept) == 1


def test_whatever_changes_an_object_compiles_it_anew(tmp_path: Path) -> None:
    project = Project(tmp_path / "one", tmp_path / "cache")
    objects = {project.compile("-O0")}
    objects.add(project.compile("-O2"))
    objects.add(project.compile("-O0", "-DSTEP=2"))
    objects.add(project.compile("-O0", "-D", "STEP=3"))
    other = Project(tmp_path / "two", tmp_path / "cache", answer=7)
    objects.add(other.compile("-O0"))
    assert len(objects) == project.compiled == 5


def test_what_fails_or_warns_is_not_kept(tmp_path: Path) -> None:
    project = Project(tmp_path / "one", tmp_path / "cache")
    project.cache.mkdir()
    (project.folder / "warns.cpp").write_text(SOURCE + "#warning planted\n")
    (project.folder / "fails.cpp").write_text(SOURCE + "int planted = ;\n")
    project.compile(source="warns.cpp")
    with pytest.raises(subprocess.CalledProcessError):
        project.compile(source="fails.cpp")
    assert project.compiled == 0
