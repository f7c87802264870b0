"""The extension is chosen by the installed MLX; without one MLX's operations take its place."""

import importlib.metadata
import importlib.util
import json
import os
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
    with pytest.raises(_versions.NoKernelsError) as error:
        _versions.extension_folder()
    message = str(error.value)
    assert f"kernels for mlx {', '.join(_versions.RELEASES)}, but this" in message
    assert f"this environment has mlx 0.1.2 and {library} 0.1.2." in message
    assert cure.format(_versions.RELEASES[-1]) in message
    assert message.endswith("make build")


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


def test_the_newest_mlx_without_its_library_is_named_with_its_cure_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, "linux", {"mlx": "9.9.9"})
    with pytest.raises(ImportError, match=r"pip install 'mlx-welford\[cpu\]'"):
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


# ---- Without the extension -----------------------------------------------------------------------

PRETEND = """
import importlib.metadata, sys, warnings
version = importlib.metadata.version
def pretended(name):
    return "0.1.2" if version(name) and name.startswith("mlx") else version(name)
importlib.metadata.version = pretended
"""
REPORT = """
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    import mlx.core as mx
    import mlx_welford as mw
y, mean, var = mw.batch_norm(mx.array([[1.0], [3.0]]))
print("results:", mean.item(), var.item(), [round(v, 3) for v in y.flatten().tolist()])
print("backend:", mw.status()["backend"])
print("kernels:", mw.status()["kernels"].splitlines()[0])
print("warnings:", len(found), *(f"{w.category.__name__} in {w.filename}" for w in found))
print("loaded:", "mlx_welford._ext" in sys.modules)
if sys.platform == "linux":
    with open("/proc/self/maps") as maps:
        print("mapped:", "/_ext." in maps.read())
"""


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_WELFORD")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("how", ["another release", "variable", "neither"])
def test_the_extension_is_loaded_beside_its_mlx_alone(how: str) -> None:
    pretend = PRETEND if how == "another release" else "import sys, warnings"
    variables = {"MLX_WELFORD_BACKEND": "fallback"} if how == "variable" else {}
    done = python(pretend + REPORT, **variables)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said["results"] == "2.0 1.0 [-1.0, 1.0]"
    without = how != "neither"
    assert said["loaded"] == said.get("mapped", said["loaded"]) == str(not without)
    assert (said["backend"] == "composed") == without
    if how == "another release":
        assert said["warnings"] == "1 RuntimeWarning in <string>"
        assert "but this environment has mlx 0.1.2 and mlx-cpu 0.1.2" in said["kernels"]
    else:
        assert said["warnings"] == "0"
        assert said["kernels"] == ("MLX_WELFORD_BACKEND=fallback" if without else "yes")


def test_no_kernels_are_an_error_if_asked_for() -> None:
    """With the text of the warning. Nothing is loaded."""
    done = python(PRETEND + "import mlx_welford", MLX_WELFORD_STRICT="1")
    warned = python(PRETEND + "import mlx_welford")
    assert done.returncode == 1
    assert warned.returncode == 0
    text = done.stderr.split("ImportError: ")[1].strip()
    assert text in warned.stderr
    assert text.endswith("make build")


def test_the_command_line_without_kernels() -> None:
    """The self-test compares with float64; a launch plan is refused with the reason."""
    arguments = ["selftest", "--quick", "--no-times", "--no-json"]
    program = "import sys; from mlx_welford.__main__ import main; sys.exit(main({}))"
    done = python(PRETEND + program.format(arguments))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "passed on the backend 'composed'" in done.stdout
    assert "FAIL" not in done.stdout
    done = python(PRETEND + program.format(["status", "--shape", "3,4"]))
    assert done.returncode == 2
    assert "There are no launch plans" in done.stderr
    assert "this environment has mlx 0.1.2" in done.stderr
