"""The extension is chosen by the installed MLX; without one the import says what to do."""

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path

import mlx_welford  # must load before anything is replaced
import nanobind
import pins
import pytest
import try_releases
from mlx_welford import _ext, _versions


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, platform: str, releases: Mapping[str, str]
) -> None:
    """Make these releases the installed ones, with a libmlx among them in `folder`."""

    def version(name: str) -> str:
        if name not in releases:
            raise importlib.metadata.PackageNotFoundError(name)
        return releases[name]

    def find_spec(name: str) -> ModuleSpec | None:
        if name not in releases:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec

    if any(name.startswith(("mlx-cpu", "mlx-cuda")) for name in releases):
        library = folder / "lib" / "libmlx.so"
        library.parent.mkdir()
        library.touch()
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(sys, "platform", platform)


def test_the_build_has_an_extension_for_the_mlx_that_is_installed() -> None:
    release = importlib.metadata.version("mlx")
    assert release in _versions.RELEASES
    folder = _versions.extension_folder()
    assert folder == Path(mlx_welford.__file__).parent / f"mlx-{release}"
    assert Path(_ext.__file__).parent == folder
    assert _ext.mlx_version == release


def test_the_build_requirements_are_the_newest_row() -> None:
    newest = pins.RELEASES[-1]
    requirements = pins.PYPROJECT["build-system"]["requires"]
    assert requirements[:3] == [
        f"mlx=={newest['mlx']}",
        f"mlx-cpu=={newest['mlx']}; sys_platform == 'linux'",
        f"nanobind=={newest['nanobind']}",
    ]


def test_the_table_names_the_internals_of_the_nanobind_that_is_installed() -> None:
    internals = {row["nanobind"]: row["internals"] for row in pins.RELEASES}
    header = Path(nanobind.include_dir()).parent / "src" / "nb_internals.h"
    texts = [path.read_text() for path in (header, *header.parents[1].rglob("nb_*.h"))]
    (version,) = {
        found[1]
        for text in texts
        if (found := re.search(r"define NB_INTERNALS_VERSION (\d+)", text))
    }
    assert internals[nanobind.__version__] == f"v{version}"


def test_the_page_has_a_row_for_each_release_and_what_was_tried() -> None:
    results = json.loads(try_releases.RESULTS.read_text())
    assert try_releases.table(results) in try_releases.PAGE.read_text()
    assert results.keys() <= {row["mlx"] for row in pins.RELEASES}


def test_a_release_without_a_row_has_no_nanobind() -> None:
    with pytest.raises(LookupError, match=r"no row for MLX 0\.1\.2, only for 0\.32\.0, "):
        pins.nanobind("0.1.2")


@pytest.mark.parametrize("release", ["0.1.0", "0.1.10"])
@pytest.mark.parametrize(
    ("platform", "libraries"),
    [
        ("linux", ["mlx-cpu"]),
        ("linux", ["mlx-cuda-12"]),
        ("linux", ["mlx-cuda-13"]),
        ("darwin", ["mlx-metal"]),
        ("darwin", []),
    ],
)
def test_each_release_has_its_extension(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    platform: str,
    libraries: list[str],
    release: str,
) -> None:
    install(monkeypatch, tmp_path, platform, dict.fromkeys(["mlx", *libraries], release))
    monkeypatch.setattr(_versions, "RELEASES", ("0.1.0", "0.1.10"))
    assert _versions.extension_folder().name == f"mlx-{release}"


@pytest.mark.parametrize(
    ("platform", "library", "cure"),
    [
        ("linux", "mlx-cpu", "pip install 'mlx=={0}' 'mlx-cpu=={0}'"),
        ("linux", "mlx-cuda-12", "pip install 'mlx=={0}' 'mlx-cuda-12=={0}'"),
        ("darwin", "mlx-metal", "pip install 'mlx=={0}' 'mlx-metal=={0}'"),
    ],
)
def test_another_release_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, library: str, cure: str
) -> None:
    install(monkeypatch, tmp_path, platform, {"mlx": "0.1.2", library: "0.1.2"})
    with pytest.raises(ImportError) as error:
        _versions.extension_folder()
    message = str(error.value)
    assert f"is for mlx {', '.join(_versions.RELEASES)}, but this" in message
    assert f"this environment has mlx 0.1.2 and {library} 0.1.2." in message
    assert cure.format(_versions.RELEASES[-1]) in message


@pytest.mark.parametrize(
    ("platform", "library"),
    [("linux", "mlx-cpu"), ("linux", "mlx-cuda-13"), ("darwin", "mlx-metal")],
)
@pytest.mark.parametrize("newer", ["mlx", "library"])
def test_a_library_of_another_release_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, library: str, newer: str
) -> None:
    """Even if the package has an extension for both."""
    releases = {"mlx": "0.1.2", library: "0.1.3"}
    if newer == "mlx":
        releases = {"mlx": "0.1.3", library: "0.1.2"}
    install(monkeypatch, tmp_path, platform, releases)
    monkeypatch.setattr(_versions, "RELEASES", ("0.1.2", "0.1.3"))
    with pytest.raises(ImportError, match="must be of the same release") as error:
        _versions.extension_folder()
    assert f"pip install 'mlx==0.1.3' '{library}==0.1.3'" in str(error.value)


def test_mlx_without_its_library_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, "linux", {"mlx": _versions.RELEASES[-1]})
    with pytest.raises(ImportError, match=r"pip install 'mlx-welford\[cpu\]'"):
        _versions.extension_folder()


def test_no_mlx_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "linux", {})
    with pytest.raises(ImportError, match=rf"pip install 'mlx=={_versions.RELEASES[-1]}'"):
        _versions.extension_folder()


@pytest.mark.parametrize("first", ["mlx_welford", "mlx.core"])
def test_mlx_may_be_installed_in_another_folder(first: str, tmp_path: Path) -> None:
    """As with `pip install --target`, or a virtual environment that sees the system's packages."""
    if sys.platform != "linux":
        pytest.skip("tried on Linux alone: elsewhere the packages of MLX are others")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    package = Path(mlx_welford.__file__).parent
    shutil.copytree(package, ours / "mlx_welford", ignore=shutil.ignore_patterns("__pycache__"))
    theirs.mkdir()
    for path in package.parent.glob("mlx*"):
        if not path.name.startswith("mlx_welford"):
            (theirs / path.name).symlink_to(path)
    program = f"""
import sys
sys.path[:0] = {[str(ours), str(theirs)]!r}
import {first}
import mlx.core as mx, mlx_welford as mw
print(mw.__file__, mx.__file__)
print(mw.instance_norm(mx.ones((2, 3, 4))).tolist() == mx.zeros((2, 3, 4)).tolist())
"""
    run = subprocess.run(  # -S: without the folder that they are installed in
        [sys.executable, "-S", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    places, right = run.stdout.splitlines()
    assert all(str(folder) in places for folder in (ours, theirs))
    assert right == "True"


def test_importing_the_package_chooses_before_it_loads_the_extension() -> None:
    program = """
import importlib.metadata, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.1.2" if version(name) else None
try:
    import mlx_welford
except ImportError as error:
    print(error)
print("extension loaded:", "mlx_welford._ext" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert "but this environment has mlx 0.1.2" in run.stdout
    assert "extension loaded: False" in run.stdout
