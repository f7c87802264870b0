"""The package refuses to load beside another MLX than it was built against, and says what to do."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path

import mlx_welford  # must load before anything is replaced
import pytest
from mlx_welford import _versions


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


def test_the_build_was_for_the_mlx_that_is_installed() -> None:
    assert importlib.metadata.version("mlx") == _versions.MLX
    assert f"mlx=={_versions.MLX}" in (importlib.metadata.requires("mlx-welford") or [])
    _versions.check()


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
def test_the_same_release_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, libraries: list[str]
) -> None:
    install(monkeypatch, tmp_path, platform, dict.fromkeys(["mlx", *libraries], _versions.MLX))
    _versions.check()


@pytest.mark.parametrize(
    ("platform", "name", "cure"),
    [
        ("linux", "mlx", "pip install 'mlx=={0}' 'mlx-cpu=={0}'"),
        ("linux", "mlx-cpu", "pip install 'mlx=={0}' 'mlx-cpu=={0}'"),
        ("linux", "mlx-cuda-12", "pip install 'mlx=={0}' 'mlx-cuda-12=={0}'"),
        ("darwin", "mlx", "pip install 'mlx=={0}'\n"),
        ("darwin", "mlx-metal", "pip install 'mlx=={0}' 'mlx-metal=={0}'"),
    ],
)
def test_another_release_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, name: str, cure: str
) -> None:
    install(monkeypatch, tmp_path, platform, {"mlx": _versions.MLX, name: "0.1.2"})
    with pytest.raises(ImportError) as error:
        _versions.check()
    message = str(error.value)
    assert f"built against {name} {_versions.MLX}, but {name} 0.1.2 is installed" in message
    assert cure.format(_versions.MLX) in message
    assert "make build" in message


def test_mlx_without_its_library_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, "linux", {"mlx": _versions.MLX})
    with pytest.raises(ImportError, match=r"pip install 'mlx-welford\[cpu\]'"):
        _versions.check()


def test_no_mlx_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "linux", {})
    with pytest.raises(ImportError, match=rf"pip install 'mlx=={_versions.MLX}'"):
        _versions.check()


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


def test_importing_the_package_checks_before_it_loads_the_extension() -> None:
    program = """
import importlib.metadata, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.1.2" if name == "mlx" else version(name)
try:
    import mlx_welford
except ImportError as error:
    print(error)
print("extension loaded:", "mlx_welford._ext" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert f"built against mlx {_versions.MLX}, but mlx 0.1.2 is installed" in run.stdout
    assert "extension loaded: False" in run.stdout
