"""The packages that a release consists of: for macOS on arm64, for Linux, and the sources.

Of the macOS wheel, whatever can be found out without a Mac. What this does not show: that it runs.
"""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from email.message import Message
from pathlib import Path

import pytest
from macos import NEWER_PLATFORMS, OLDEST, PLATFORM, ROOT, RPATH, read, shaders, unaccounted
from mlx_welford._build import MLX, PACKAGE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="these targets of the Makefile are Linux's"),
]

PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
# Installed to see them refused.
OTHER_RELEASES = ("0.32.0", "0.32.3")
TIMEOUT = 600  # seconds, for what takes up to 100


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints. Fails with all of it unless the command succeeds."""
    # What make would hand down to another make, and Python to another environment's.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "MFLAGS", "PYTHON", "MLX_WELFORD"))
    }
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def make(target: str, folder: Path, source: Path = ROOT) -> Path:
    """What a target of the Makefile puts into `folder`."""
    run("make", "--assume-old=build", target, f"DIST={folder}", f"SOURCE={source}")
    (result,) = folder.iterdir()
    return result


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {n: archive.read(n) for n in archive.namelist() if not n.endswith("/")}


def headers(files: Mapping[str, bytes], name: str) -> Message:
    return email.message_from_bytes(files[f"mlx_welford-{PACKAGE}.dist-info/{name}"])


@pytest.fixture(scope="module")
def macos_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("wheel-macos", tmp_path_factory.mktemp("macos"))


@pytest.fixture(scope="module")
def linux_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("wheels", tmp_path_factory.mktemp("linux"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sources."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(make("sdist", folder / "packed")) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"mlx_welford-{PACKAGE}"


@pytest.fixture(scope="module")
def extension(macos_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The macOS wheel's extension."""
    name = f"mlx_welford/_ext.cpython-{PYTHON[2:]}-darwin.so"
    with zipfile.ZipFile(macos_wheel) as archive:
        return Path(archive.extract(name, tmp_path_factory.mktemp("extension")))


# ---- macOS ---------------------------------------------------------------------------------------


def test_the_name_and_the_tag_say_what_it_is_for(macos_wheel: Path) -> None:
    tag = f"{PYTHON}-{PYTHON}-{PLATFORM}"
    assert macos_wheel.name == f"mlx_welford-{PACKAGE}-{tag}.whl"
    said = headers(contents(macos_wheel), "WHEEL")
    assert said.get_all("Tag") == [tag]
    assert said["Root-Is-Purelib"] == "false"


@pytest.mark.parametrize("platform", [PLATFORM, NEWER_PLATFORMS[-1]])
def test_pip_takes_it_for(macos_wheel: Path, tmp_path: Path, platform: str) -> None:
    assert f"Would install mlx-welford-{PACKAGE}" in dry_run(macos_wheel, tmp_path, platform)


def test_pip_does_not_take_it_for_an_older_macos(macos_wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="is not a supported wheel on this platform"):
        dry_run(macos_wheel, tmp_path, "macosx_13_0_arm64")


def dry_run(wheel: Path, folder: Path, platform: str) -> str:
    options = ["--no-deps", "--no-index", "--only-binary=:all:", "--dry-run"]
    into = ["--platform", platform, "--target", str(folder)]
    return run(sys.executable, "-m", "pip", "install", *options, *into, wheel)


def test_is_for_arm64_and_the_oldest_macos(extension: Path) -> None:
    image = read(extension)
    assert (image.architecture, image.platform, image.minimum) == ("ARM64", "MACOS", OLDEST)
    assert image.kind == "DYLIB"
    assert image.signed
    assert image.exports - {"__mh_dylib_header", "___dso_handle"} == {"_PyInit__ext"}


def test_finds_mlx_beside_itself(extension: Path) -> None:
    image = read(extension)
    assert image.rpaths == [RPATH]
    assert image.libraries == {
        "@rpath/libmlx.dylib",
        "/usr/lib/libSystem.B.dylib",
        "/usr/lib/libobjc.A.dylib",
    }


def test_every_undefined_symbol_is_accounted_for(extension: Path) -> None:
    assert unaccounted(extension) == set()


def test_dispatches_with_metal(extension: Path) -> None:
    encoder = {symbol for symbol in read(extension).imports if "5metal14CommandEncoder" in symbol}
    assert any("dispatch_threadgroups" in symbol for symbol in encoder)


def test_the_shaders_are_in_it_and_the_simulator_is_not(extension: Path) -> None:
    generated = shaders().read_text()
    source = re.search(r'R"metal\((.*)\)metal"', generated, re.DOTALL)
    assert source is not None
    data = extension.read_bytes()
    assert source[1].encode() in data
    assert b"simulator_dispatch" not in data
    assert not {"_dlopen", "_dlsym"} & set(read(extension).imports)


def test_is_small_and_names_no_path_of_this_machine(macos_wheel: Path) -> None:
    files = contents(macos_wheel)
    assert macos_wheel.stat().st_size < 2_000_000
    assert sum(map(len, files.values())) < 2_000_000
    for folder in (str(ROOT), sys.prefix, sys.base_prefix, str(Path.home())):
        for name, data in files.items():
            assert folder.encode() not in data, name


def test_the_same_sources_give_the_same_bytes(
    macos_wheel: Path, sdist: Path, tmp_path: Path
) -> None:
    """Also from another folder, with nothing built before, and from the source distribution."""
    again = make("wheel-macos", tmp_path, sdist)
    assert again.name == macos_wheel.name
    files, expected = contents(again), contents(macos_wheel)
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []
    assert again.read_bytes() == macos_wheel.read_bytes()


# ---- Any wheel -----------------------------------------------------------------------------------


def test_the_wheels_differ_in_the_extension_alone(macos_wheel: Path, linux_wheel: Path) -> None:
    def portable(wheel: Path) -> set[str]:
        return {n for n in contents(wheel) if not n.endswith((".so", "RECORD", "WHEEL"))}

    macos, linux = contents(macos_wheel), contents(linux_wheel)
    names = portable(macos_wheel)
    assert names == portable(linux_wheel)
    assert {name for name in names if macos[name] != linux[name]} == set()
    assert {"mlx_welford/_ext.pyi", "mlx_welford/_build.py", "mlx_welford/py.typed"} <= names


def test_the_package_is_complete(linux_wheel: Path) -> None:
    package = ROOT / "python" / "mlx_welford"
    sources = {f"mlx_welford/{path.relative_to(package)}" for path in package.rglob("*.py*")}
    sources = {name for name in sources if "__pycache__" not in name}
    held = {name for name in contents(linux_wheel) if name.startswith("mlx_welford/")}
    assert {name for name in held if not name.endswith((".so", "py.typed"))} == sources


def test_requires_exactly_the_mlx_that_it_was_built_against(linux_wheel: Path) -> None:
    files = contents(linux_wheel)
    metadata = headers(files, "METADATA")
    assert (metadata["Name"], metadata["Version"]) == ("mlx-welford", PACKAGE)
    assert metadata["License-File"] == "LICENSE"
    requirements = metadata.get_all("Requires-Dist") or []
    assert [line for line in requirements if "extra" not in line] == [f"mlx=={MLX}"]
    (cpu,) = (line for line in requirements if 'extra == "cpu"' in line)
    assert re.fullmatch(rf'mlx-cpu=={MLX}; sys_platform == "linux" and .*', cpu)
    assert {"bench", "cpu"} <= set(metadata.get_all("Provides-Extra") or [])
    assert f'MLX = "{MLX}"'.encode() in files["mlx_welford/_build.py"]


# ---- Linux ---------------------------------------------------------------------------------------


def test_is_tagged_manylinux_without_a_copy_of_libmlx(linux_wheel: Path) -> None:
    assert re.search(rf"-{PYTHON}-{PYTHON}-manylinux_2_\d+_\w+\.whl$", linux_wheel.name)
    files = contents(linux_wheel)
    assert [name for name in files if name.split("/")[0].endswith(".libs")] == []
    (extension,) = (data for name, data in files.items() if name.endswith(".so"))
    assert b"$ORIGIN/../mlx/lib" in extension
    assert b"simulator_dispatch" not in extension


def environment(folder: Path, *requirements: str | Path) -> Path:
    """The interpreter of a new environment that has these requirements alone."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    install(python, *requirements)
    return python


def install(python: Path, *requirements: str | Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    run(*pip, "install", "--quiet", *requirements)


def test_passes_the_self_test_in_an_empty_environment(linux_wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", f"{linux_wheel}[cpu]")
    run(python, "-m", "mlx_welford", "selftest", "--quick", "--no-times")
    program = "import mlx_welford as mw; print(mw.__file__)"
    assert run(python, "-c", program).startswith(str(tmp_path))


def test_another_mlx_is_refused_with_the_cure(linux_wheel: Path, tmp_path: Path) -> None:
    """The extension, which could crash beside it, is not even loaded (see test_versions.py)."""
    python = environment(tmp_path / "venv", "--no-deps", linux_wheel)
    for release in OTHER_RELEASES:
        assert release != MLX
        install(python, "--no-deps", f"mlx=={release}", f"mlx-cpu=={release}")
        with pytest.raises(AssertionError) as error:
            run(python, "-c", "import mlx_welford")
        message = str(error.value)
        assert f"built against mlx {MLX}, but mlx {release} is installed" in message
        assert f"pip install 'mlx=={MLX}' 'mlx-cpu=={MLX}'" in message
        assert "ImportError" in message
