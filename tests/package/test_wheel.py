"""The packages that a release consists of: for macOS on arm64, for Linux, and the sources.

Wheels are built for the running CPython, with the oldest and the newest release of MLX, and for the
newest other CPython that is here with headers, with the newest MLX alone. Of those for macOS,
whatever can be found out without a Mac. What this does not show: that they run.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.message import Message
from functools import cache
from pathlib import Path

import lief
import macho_tables
import pins
import pytest
from macos import (
    NEWER_PLATFORMS,
    OLDEST,
    PLATFORM,
    ROOT,
    RPATH,
    headers,
    libmlx,
    read,
    shaders,
    unaccounted,
)
from mlx_welford._build import PACKAGE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="these targets of the Makefile are Linux's"),
]

OLDEST_ROW, NEWEST = pins.RELEASES[0]["mlx"], pins.RELEASES[-1]["mlx"]
NEWER = "99.0"  # pretended: MLX's newest under another name
LARGEST = 4_000_000  # bytes of a wheel for all releases
TIMEOUT = 1800  # seconds, for what takes up to 100 where nothing else runs


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


@dataclass(frozen=True)
class CPython:
    path: str
    release: str

    @property
    def tag(self) -> str:
        return "cp" + self.release.replace(".", "")

    @property
    def built_for(self) -> list[str]:
        """The releases of MLX that its wheels are built for here."""
        return [OLDEST_ROW, NEWEST] if self.path == sys.executable else [NEWEST]


@cache
def interpreters() -> list[CPython]:
    """What the Makefile builds for: the running one, then any other that is here."""
    paths = run(sys.executable, "cmake/interpreters.py").split()
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    return [CPython(path, run(path, "-c", program).strip()) for path in paths]


@pytest.mark.quick
def test_wheels_are_built_for_every_supported_cpython_here() -> None:
    """The running one first, each release once, and none that pyproject.toml does not name."""
    running, *others = (cpython.release for cpython in interpreters())
    assert running == "{}.{}".format(*sys.version_info[:2])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {line.rpartition(" :: ")[2] for line in project["classifiers"]}
    assert {running, *others} <= named
    assert len({running, *others}) == 1 + len(others)


@pytest.fixture(scope="module", params=["running", "newest other"])
def cpython(request: pytest.FixtureRequest) -> CPython:
    running, *others = interpreters()
    if request.param == "running":
        return running
    if not others:
        pytest.skip("no other CPython of the support range is here with its headers")
    return others[-1]


def make(
    target: str, folder: Path, cpython: CPython, releases: list[str], source: Path | None = None
) -> Path:
    """The one file that a target of the Makefile puts into `folder`. Warnings are errors.

    Of this checkout what does not depend on the CPython is compiled once, of another folder anew.
    """
    variables = [f"DIST={folder}", f"PYTHONS={cpython.path}", "WERROR=ON"]
    variables.append(f"RELEASES={' '.join(releases)}")
    if source is None:
        once = [
            sys.executable,
            str(ROOT / "tests" / "support" / "compiler_cache.py"),
            str(ROOT / "build/objects"),
        ]
        variables.append("LAUNCHER=" + ";".join(map(str, once)))
    else:
        variables.append(f"SOURCE={source}")
    run("make", "--assume-old=build", target, *variables)
    (result,) = folder.iterdir()
    return result


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {n: archive.read(n) for n in archive.namelist() if not n.endswith("/")}


def fields(files: Mapping[str, bytes], name: str) -> Message:
    """The fields of a file about the wheel."""
    return email.message_from_bytes(files[f"mlx_welford-{PACKAGE}.dist-info/{name}"])


@pytest.fixture(scope="module")
def macos_wheel(cpython: CPython, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("wheel-macos", tmp_path_factory.mktemp("macos"), cpython, cpython.built_for)


@pytest.fixture(scope="module")
def linux_wheel(cpython: CPython, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("wheels", tmp_path_factory.mktemp("linux"), cpython, cpython.built_for)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("sdist", tmp_path_factory.mktemp("sdist"), interpreters()[0], [])


def libraries(cpython: CPython, ending: str) -> set[str]:
    """The modules of a wheel for one platform: _core once, _ext for each release of MLX."""
    modules = ("_core", *(f"mlx-{release}/_ext" for release in cpython.built_for))
    return {f"mlx_welford/{module}.cpython-{cpython.tag[2:]}-{ending}" for module in modules}


def unpacked(wheel: Path, module: str, cpython: CPython, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = f"mlx_welford/{module}.cpython-{cpython.tag[2:]}-darwin.so"
        return Path(archive.extract(name, folder))


@pytest.fixture(scope="module", params=[OLDEST_ROW, NEWEST])
def release(request: pytest.FixtureRequest, cpython: CPython) -> str:
    if request.param not in cpython.built_for:
        pytest.skip("to save time, wheels for another CPython are for the newest MLX alone")
    return str(request.param)


@pytest.fixture(scope="module")
def extension(
    macos_wheel: Path, cpython: CPython, release: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The macOS wheel's extension for a release of MLX."""
    folder = tmp_path_factory.mktemp("extension")
    return unpacked(macos_wheel, f"mlx-{release}/_ext", cpython, folder)


# ---- macOS ---------------------------------------------------------------------------------------


def test_the_name_and_the_tag_say_what_it_is_for(macos_wheel: Path, cpython: CPython) -> None:
    tag = f"{cpython.tag}-{cpython.tag}-{PLATFORM}"
    assert macos_wheel.name == f"mlx_welford-{PACKAGE}-{tag}.whl"
    said = fields(contents(macos_wheel), "WHEEL")
    assert said.get_all("Tag") == [tag]
    assert said["Root-Is-Purelib"] == "false"


@pytest.mark.parametrize("platform", [PLATFORM, NEWER_PLATFORMS[-1]])
def test_pip_takes_it_for(
    macos_wheel: Path, cpython: CPython, tmp_path: Path, platform: str
) -> None:
    said = dry_run(macos_wheel, tmp_path, platform, cpython.release)
    assert f"Would install mlx-welford-{PACKAGE}" in said


def test_pip_does_not_take_it_for_an_older_macos(
    macos_wheel: Path, cpython: CPython, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="is not a supported wheel on this platform"):
        dry_run(macos_wheel, tmp_path, "macosx_13_0_arm64", cpython.release)


def dry_run(wheel: Path, folder: Path, platform: str, release: str) -> str:
    options = ["--no-deps", "--no-index", "--only-binary=:all:", "--dry-run"]
    into = ["--platform", platform, "--python-version", release, "--target", str(folder)]
    return run(sys.executable, "-m", "pip", "install", *options, *into, wheel)


def test_is_for_arm64_and_the_oldest_macos(extension: Path) -> None:
    image = read(extension)
    assert (image.architecture, image.platform, image.minimum) == ("ARM64", "MACOS", OLDEST)
    assert image.kind == "DYLIB"
    assert image.signed
    # Up to 2.15 nanobind's exceptions are visible, as what is thrown between images would be.
    exports = {symbol for symbol in image.exports if "8nanobind" not in symbol}
    assert exports - {"__mh_dylib_header", "___dso_handle"} == {"_PyInit__ext"}


def test_finds_mlx_beside_itself(extension: Path) -> None:
    image = read(extension)
    assert image.name == extension.name
    assert image.rpaths == [RPATH]
    assert image.libraries == {
        "@rpath/libmlx.dylib",
        "/usr/lib/libSystem.B.dylib",
        "/usr/lib/libc++.1.dylib",
        "/usr/lib/libobjc.A.dylib",
    }


def test_the_rules_for_arguments_do_without_mlx(
    macos_wheel: Path, cpython: CPython, tmp_path: Path
) -> None:
    core = unpacked(macos_wheel, "_core", cpython, tmp_path)
    image = read(core)
    assert (image.architecture, image.platform, image.minimum) == ("ARM64", "MACOS", OLDEST)
    assert image.signed
    assert image.libraries == {"/usr/lib/libSystem.B.dylib", "/usr/lib/libc++.1.dylib"}
    assert unaccounted(core, cpython.path, cpython.release) == set()


def test_what_it_needs_of_cxx_is_looked_for_in_libcxx_alone(extension: Path) -> None:
    """Not in whatever happens to be loaded: a symbol that is not in libcxx.tbd has no library."""
    imports = {
        symbol: library
        for symbol, library in read(extension).imports.items()
        if symbol in macho_tables.bound(extension)
    }
    cxx = {s for s in imports if s.startswith(("__ZNSt", "__ZNKSt", "__ZSt", "__ZTISt", "___cxa_"))}
    cxx -= {"___cxa_atexit"}  # of libSystem
    assert len(cxx) > 90
    assert {imports[symbol] for symbol in cxx} == {"/usr/lib/libc++.1.dylib"}
    # Elsewhere dyld looks for CPython's functions, and for a virtual function of MLX's Primitive
    # that is in every image that has a primitive.
    anywhere = {symbol for symbol, library in imports.items() if library is None}
    rest = {s for s in anywhere if not s.startswith(("_Py", "__Py", "__ZN3mlx4core9Primitive"))}
    assert rest <= {"__tlv_bootstrap"}


def test_every_page_has_the_hash_that_the_signature_says(extension: Path) -> None:
    """macOS ends a process that touches another page; zig's linker makes the signature."""
    found = macho_tables.signature(extension)
    assert found.flags & macho_tables.ADHOC
    assert found.hash_type == macho_tables.SHA256
    assert found.identifier == extension.name
    assert found.code_limit == found.position
    assert found.pages == -(-found.code_limit // found.page)
    assert found.wrong_pages == []


def test_a_changed_byte_breaks_the_signature(extension: Path, tmp_path: Path) -> None:
    data = bytearray(extension.read_bytes())
    data[0x5000] ^= 1
    changed = tmp_path / extension.name
    changed.write_bytes(data)
    found = macho_tables.signature(changed)
    assert found.wrong_pages == [0x5000 // found.page]


def test_every_unwind_entry_fits_its_function(extension: Path) -> None:
    """Ranges, in order and in the code; for handlers, where they are and who reads them."""
    functions = macho_tables.functions(extension)
    code = macho_tables.address_of_section(extension, "__text")
    handlers = macho_tables.address_of_section(extension, "__gcc_except_tab")
    starts = [f.start for f in functions]
    assert starts == sorted(set(starts))
    assert all(f.start in code for f in functions if f.encoding)
    has_lsda = 0x40000000
    for f in functions:
        assert bool(f.encoding & has_lsda) == (f.lsda is not None), hex(f.start)
        assert (f.personality is not None) == (f.lsda is not None), hex(f.start)
        assert f.lsda is None or f.lsda in handlers, hex(f.start)
        assert (f.mode == macho_tables.DWARF) == (f.frame is not None)
        if f.frame is not None:
            assert f.frame.start == f.start, hex(f.start)
            assert f.frame.end <= f.end, hex(f.start)
            assert f.frame.lsda == f.lsda, hex(f.start)
            assert f.frame.personality in (f.personality, None) or f.lsda is None, hex(f.start)
    with_handlers = [f for f in functions if f.lsda is not None]
    assert len(with_handlers) > 100
    personalities = {f.personality for f in with_handlers}
    assert {macho_tables.bound_at(extension, p) for p in personalities if p is not None} == {
        "___gxx_personality_v0"
    }


def test_every_undefined_symbol_is_accounted_for(
    extension: Path, cpython: CPython, release: str
) -> None:
    assert unaccounted(extension, cpython.path, cpython.release, release) == set()


@pytest.mark.parametrize("platform", NEWER_PLATFORMS)
def test_fits_the_mlx_of_newer_systems(extension: Path, release: str, platform: str) -> None:
    """There the extension meets another build of libmlx: its classes and symbols must agree."""
    ours, others = headers(release=release), headers(platform, release)
    for path in ours.rglob("*.h*"):
        assert path.read_bytes() == (others / path.relative_to(ours)).read_bytes(), path
    of_mlx = set(read(extension).imports) & read(libmlx(release=release)).exports
    assert len(of_mlx) > 30
    assert of_mlx <= read(libmlx(platform, release)).exports


@pytest.mark.parametrize(
    "function",
    [
        "mlx4core5metal6deviceE",
        "mlx4core5metal19get_command_encoderE",
        "mlx4core5metal6Device11get_libraryE",
        "mlx4core5metal6Device10get_kernelE",
        "mlx4core5metal14CommandEncoder15set_input_arrayE",
        "mlx4core5metal14CommandEncoder16set_output_arrayE",
        "mlx4core5metal14CommandEncoder13add_temporaryE",
        "mlx4core5metal14CommandEncoder21dispatch_threadgroupsE",
        "s_ksetBytes_length_atIndex_E",
        "s_ksetComputePipelineState_E",
        "s_kmaxTotalThreadsPerThreadgroupE",
    ],
)
def test_the_metal_encoder_is_in_it(extension: Path, release: str, function: str) -> None:
    (symbol,) = (symbol for symbol in read(extension).imports if function in symbol)
    assert symbol in read(libmlx(release=release)).exports


def test_the_shaders_are_in_it_and_the_simulator_is_not(extension: Path) -> None:
    data = extension.read_bytes()
    generated = shaders().read_text()
    digest = re.search(r'kShaderHash\[\] = "(\w+)"', generated)
    source = re.search(r'R"metal\((.*)\)metal"', generated, re.DOTALL)
    assert digest is not None
    assert source is not None
    assert digest[1].encode() in data
    assert source[1].encode() in data
    assert b"simulator_dispatch" not in data
    assert not {"_dlopen", "_dlsym"} & set(read(extension).imports)


def size_for_all_releases(wheel: Path, cpython: CPython) -> int:
    """At most what a wheel for all releases of MLX takes: the others like the largest one."""
    with zipfile.ZipFile(wheel) as archive:
        files = [file for file in archive.infolist() if "/_ext." in file.filename]
    largest = max(file.compress_size for file in files if file.filename.endswith(".so"))
    return wheel.stat().st_size + (len(pins.RELEASES) - len(cpython.built_for)) * largest


def test_is_small_and_names_no_path_of_this_machine(macos_wheel: Path, cpython: CPython) -> None:
    files = contents(macos_wheel)
    assert {name for name in files if name.endswith(".so")} == libraries(cpython, "darwin.so")
    assert size_for_all_releases(macos_wheel, cpython) < LARGEST
    for folder in (str(ROOT), sys.prefix, sys.base_prefix, str(Path.home())):
        for name, data in files.items():
            assert folder.encode() not in data, name


@pytest.mark.parametrize("cpython", ["running"], indirect=True)
def test_the_same_sources_give_the_same_bytes(
    macos_wheel: Path, sdist: Path, cpython: CPython, tmp_path: Path
) -> None:
    """Also from another folder, with nothing built before, and from the source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"mlx_welford-{PACKAGE}"
    wheel = make("wheel-macos", tmp_path / "wheel", cpython, [NEWEST], unpacked)
    assert differing(wheel, macos_wheel) == {"RECORD", "_build.py"}


def differing(wheel: Path, other: Path) -> set[str]:
    """The files in which a wheel for the newest MLX differs from one for the oldest as well.

    What the other one holds for the oldest MLX is left out.
    """
    assert wheel.name == other.name
    files, others = contents(wheel), contents(other)
    assert files.keys() == {name for name in others if f"mlx-{OLDEST_ROW}/" not in name}
    return {Path(name).name for name in files if files[name] != others[name]}


# ---- Any wheel -----------------------------------------------------------------------------------


def test_the_wheels_differ_in_the_extension_alone(macos_wheel: Path, linux_wheel: Path) -> None:
    def portable(wheel: Path) -> set[str]:
        return {n for n in contents(wheel) if not n.endswith((".so", "RECORD", "WHEEL"))}

    macos, linux = contents(macos_wheel), contents(linux_wheel)
    names = portable(macos_wheel)
    assert names == portable(linux_wheel)
    assert {name for name in names if macos[name] != linux[name]} == set()
    generated = {"_build.py", "_core.pyi", "_ext.pyi", "py.typed"}
    assert {f"mlx_welford/{name}" for name in generated} <= names


def test_the_package_is_complete(linux_wheel: Path) -> None:
    package = ROOT / "python" / "mlx_welford"
    sources = {f"mlx_welford/{path.relative_to(package)}" for path in package.rglob("*.py*")}
    sources = {name for name in sources if "__pycache__" not in name}
    held = {name for name in contents(linux_wheel) if name.startswith("mlx_welford/")}
    assert {name for name in held if not name.endswith((".so", "py.typed"))} == sources


def test_requires_any_mlx_from_the_oldest_on(linux_wheel: Path, cpython: CPython) -> None:
    files = contents(linux_wheel)
    metadata = fields(files, "METADATA")
    assert (metadata["Name"], metadata["Version"]) == ("mlx-welford", PACKAGE)
    assert metadata["License-File"] == "LICENSE"
    requirements = metadata.get_all("Requires-Dist") or []
    assert [line for line in requirements if "extra" not in line] == [f"mlx>={pins.OLDEST}"]
    (cpu,) = (line for line in requirements if 'extra == "cpu"' in line)
    assert re.fullmatch(rf'mlx\[cpu\]>={pins.OLDEST}; sys_platform == "linux" and .*', cpu)
    assert {"bench", "cpu"} <= set(metadata.get_all("Provides-Extra") or [])
    built_for = "".join(f'"{release}", ' for release in cpython.built_for).rstrip()
    assert f"RELEASES = ({built_for})" in files["mlx_welford/_build.py"].decode()


# ---- Linux ---------------------------------------------------------------------------------------


def test_is_tagged_manylinux_without_a_copy_of_libmlx(linux_wheel: Path, cpython: CPython) -> None:
    assert re.search(rf"-{cpython.tag}-{cpython.tag}-manylinux_2_\d+_\w+\.whl$", linux_wheel.name)
    files = contents(linux_wheel)
    assert [name for name in files if name.split("/")[0].endswith(".libs")] == []
    assert size_for_all_releases(linux_wheel, cpython) < LARGEST
    core, *extensions = (files[name] for name in sorted(files) if name.endswith(".so"))
    assert len(extensions) == len(cpython.built_for)
    for extension in extensions:
        assert b"$ORIGIN/../../mlx/lib" in extension
        assert b"simulator_dispatch" not in extension
    assert b"libmlx" not in core


@pytest.mark.parametrize("cpython", ["running"], indirect=True)
def test_the_sdist_builds_in_isolation_to_the_same_bytes(
    linux_wheel: Path, sdist: Path, cpython: CPython, tmp_path: Path
) -> None:
    """pip alone, in an empty environment, fetches all that pyproject.toml says a build needs.

    It builds for the newest MLX alone.
    """
    pip = pip_of(environment(tmp_path / "venv", cpython))
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheel", sdist)
    (wheel,) = (tmp_path / "wheel").iterdir()
    # auditwheel rewrites what it has found out about: compare what it was given.
    other = ROOT / "build" / "unaudited" / wheel.name
    assert differing(wheel, other) == {"RECORD", "_build.py"}


@pytest.mark.parametrize("cpython", ["running"], indirect=True)
def test_is_built_for_arm64_too(cpython: CPython, tmp_path: Path) -> None:
    """Compiled and linked against the libmlx that it will meet, which has all that it refers to."""
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("there is no cross compiler here (Debian's g++-aarch64-linux-gnu)")
    wheel = make("wheel-aarch64", tmp_path, cpython, cpython.built_for)
    assert re.search(rf"-{cpython.tag}-{cpython.tag}-manylinux_2_\d+_aarch64\.whl$", wheel.name)
    files = contents(wheel)
    modules = libraries(cpython, "aarch64-linux-gnu.so")
    assert {name for name in files if name.endswith(".so")} == modules
    core, *extensions = (elf(files[name]) for name in sorted(modules))
    assert core.header.machine_type.name == "AARCH64"
    assert "libmlx.so" not in core.libraries
    for release, extension in zip(cpython.built_for, extensions, strict=True):
        assert extension.header.machine_type.name == "AARCH64"
        assert "libmlx.so" in extension.libraries
        folder = ROOT / "build" / "releases" / "manylinux_2_35_aarch64" / release
        libmlx = elf((folder / "mlx" / "lib" / "libmlx.so").read_bytes())
        of_mlx = {n for n in names(extension.imported_symbols) if n.startswith("_ZN3mlx4core")}
        assert len(of_mlx) > 30
        assert of_mlx <= names(libmlx.exported_symbols)


def elf(data: bytes) -> lief.ELF.Binary:
    binary = lief.ELF.parse(list(data))
    assert binary is not None
    return binary


def names(symbols: Iterable[lief.Symbol]) -> set[str]:
    return {str(symbol.name) for symbol in symbols}


def environment(folder: Path, cpython: CPython, *requirements: str | Path) -> Path:
    """The interpreter of a new environment that has these requirements alone."""
    run(cpython.path, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    if requirements:
        run(*pip_of(python), "install", "--quiet", *requirements)
    return python


def pip_of(python: Path) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]


def test_passes_the_self_test_in_an_empty_environment(
    linux_wheel: Path, cpython: CPython, release: str, tmp_path: Path
) -> None:
    """With the oldest and the newest MLX, from the same wheel."""
    python = environment(tmp_path / "venv", cpython, f"{linux_wheel}[cpu]", f"mlx=={release}")
    run(python, "-m", "mlx_welford", "selftest", "--quick", "--no-times", "--no-json")
    program = "import mlx_welford as mw; print(mw._ext.__file__, mw.status()['mlx_built_against'])"
    file, built_against = run(python, "-c", program).split()
    assert file.startswith(str(tmp_path))
    assert (Path(file).parent.name, built_against) == (f"mlx-{release}", release)


@pytest.mark.parametrize("release", [pins.OLDEST, NEWER])
@pytest.mark.parametrize("cpython", ["running"], indirect=True)
def test_beside_another_mlx_it_works_without_kernels(
    linux_wheel: Path, cpython: CPython, release: str, tmp_path: Path
) -> None:
    """The extension, which could crash beside it, is not even loaded (see test_versions.py)."""
    installed = NEWEST if release == NEWER else release
    packages = [f"mlx=={installed}", f"mlx-cpu=={installed}"]
    python = environment(tmp_path / "venv", cpython, "--no-deps", linux_wheel, *packages)
    if release == NEWER:
        for metadata in tmp_path.glob("venv/lib/*/site-packages/mlx*.dist-info/METADATA"):
            text = metadata.read_text(encoding="utf-8")
            metadata.write_text(text.replace(f"Version: {NEWEST}", f"Version: {release}"), "utf-8")
    said = run(python, "-m", "mlx_welford", "selftest", "--quick", "--no-times", "--no-json")
    assert "passed on the backend 'composed'" in said
    built_for = ", ".join(cpython.built_for)
    assert f"kernels for mlx {built_for}, but this environment has mlx {release}" in said
    assert f"pip install 'mlx=={NEWEST}' 'mlx-cpu=={NEWEST}'" in said
