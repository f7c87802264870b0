"""Settings that every test shares, and the backends that tests run on.

A module marked ``every_backend`` runs once for each backend that is present: the CPU's kernels, the
shaders in the simulator (on Linux), and the shaders on a Mac's GPU. ``--backend`` chooses among
them. Tests without that mark, and fixtures of modules, run on the CPU, also where MLX's default is
the GPU.

With MLX_WELFORD_BACKEND=fallback the process never loads the extension, as beside a release of MLX
without kernels. The one backend is then "fallback", and the tests are those of the FOLDERS below;
what is about kernels is marked so, and skipped with that reason.

MLX has no float64 on a GPU. Tests with a parameter of that dtype, or marked ``float64``, are
skipped there; tests that draw a dtype by themselves take it from ``problems.dtypes()``.

In the simulator the seed that orders the threads and whether denormals are flushed vary from test
to test, unless MLX_WELFORD_SIM_SEED and MLX_WELFORD_SIM_FTZ are set.

Three profiles, chosen by MLX_WELFORD_TEST_PROFILE and by targets of the Makefile: `quick` runs a
few rows of each test and leaves out slow tests; `default` runs everything, with tables marked
`pairwise` thinned; `nightly` runs whole tables and many more random problems. All random numbers
follow from MLX_WELFORD_TEST_SEED (default 0); a failing test prints its seeds.
"""

import os
import random
import sys
import zlib
from collections.abc import Generator, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from mlx_welford._operations import operations
from packaging.version import Version
from problems import FLOAT64_IS_NOT_ON_GPU, SEED
from selection import BACKENDS, UNTOUCHED, backends_of, parameters, quick, thinned
from simulator.loader import compile_library

SIMULATOR_SEEDS = 3

FALLBACK = operations.backend() == "composed"
FOLDERS = ("graph", "layers", "numerics")  # of the tests that run on the fallback
if FALLBACK:
    sys.modules["mlx_welford._ext"] = None  # type: ignore[assignment]  # importing it is an error
    collect_ignore_glob = [
        f"{folder.name}/*"
        for folder in Path(__file__).parent.iterdir()
        if folder.is_dir() and folder.name not in FOLDERS
    ]

PROFILE = os.environ.get("MLX_WELFORD_TEST_PROFILE", "default")
EXAMPLES = {"quick": 4, "default": 60, "nightly": 1000}  # of each test with random problems

# Files with slow fixtures or processes run first, so that the other workers do not wait for them at
# the end. The others follow by name.
SLOW_FIRST = (
    "test_wheel.py",
    "test_simulator_fidelity.py",
    "test_backward.py",
    "test_cuda.py",
    "test_train_distributed.py",
    "test_instruction_sets.py",
    "test_past_caches.py",
    "test_macos.py",
)

for _name, _examples in EXAMPLES.items():
    settings.register_profile(
        _name,
        deadline=None,  # the first example pays for thread start-up and page faults
        max_examples=_examples,
        derandomize=_name != "nightly",
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile(PROFILE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=BACKENDS,
        help="run on this backend alone; may be given again (default: all that are present)",
    )
    parser.addoption(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="run the files, and the tests of each, in a random order",
    )


def pytest_configure() -> None:
    mx.set_default_device(mx.cpu)


def has_metal() -> bool:
    """Whether there is a Metal device: MLX for macOS calls Metal available even where none is."""
    return mx.metal.is_available() and mx.is_available(mx.gpu)


def present() -> list[str]:
    """The backends here. MLX_WELFORD_REQUIRE_GPU=1 makes a missing GPU an error."""
    if FALLBACK:
        return ["fallback"]
    found = ["cpu", "sim"] if sys.platform == "linux" else ["cpu"]
    if has_metal():
        return [*found, "gpu"]
    if os.environ.get("MLX_WELFORD_REQUIRE_GPU") == "1":
        raise pytest.UsageError("MLX_WELFORD_REQUIRE_GPU=1, but MLX finds no Metal device.")
    return found


def chosen(config: pytest.Config) -> list[str]:
    asked: list[str] | None = config.getoption("--backend")
    for name in asked or ():
        if name not in present():
            needed = "MLX_WELFORD_BACKEND=fallback is not set, or some other backend is asked for"
            reason = needed if FALLBACK or name == "fallback" else "there is none on this machine"
            raise pytest.UsageError(f"--backend {name}: {reason}.")
    return asked or present()


def pytest_report_header(config: pytest.Config) -> str:
    missing = [name for name in BACKENDS if name not in chosen(config)]
    return (
        f"backends: {', '.join(chosen(config))}; not run: {', '.join(missing) or 'none'}; "
        f"profile: {PROFILE}; seed: {SEED}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("every_backend"):
        metafunc.parametrize("backend", chosen(metafunc.config), indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in backends_of(item) and needs_float64(item):
            item.add_marker(pytest.mark.skip(reason=FLOAT64_IS_NOT_ON_GPU))
        if FALLBACK and (mark := item.get_closest_marker("kernels")):
            item.add_marker(pytest.mark.skip(reason=f"is about kernels: {mark.args[0]}"))
        for mark in item.iter_markers("since"):
            release, reason = mark.args
            if Version(version("mlx")) < Version(release):
                item.add_marker(pytest.mark.skip(reason=f"before MLX {release}, {reason}"))
    if PROFILE != "nightly":
        keep(config, items, thinned(items))
    kept = quick(items)
    untouched = {item.path for item in items} - {item.path for item in kept}
    config.stash[UNTOUCHED] = {path.name for path in untouched}
    if PROFILE == "quick":
        keep(config, items, kept)
    seed = config.getoption("--shuffle")
    if seed is not None:
        rng = random.Random(seed)
        place = {path: rng.random() for path in sorted({item.path for item in items})}
        rng.shuffle(items)
        items.sort(key=lambda item: place[item.path])
    else:
        items.sort(key=lambda item: slowness(item.path.name))


def slowness(name: str) -> int:
    return SLOW_FIRST.index(name) if name in SLOW_FIRST else len(SLOW_FIRST)


def keep(config: pytest.Config, items: list[pytest.Item], wanted: set[pytest.Item]) -> None:
    """Leaves these items alone in the list, and reports the others as deselected."""
    dropped = [item for item in items if item not in wanted]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item in wanted]


def needs_float64(item: pytest.Item) -> bool:
    """By its mark, or by a parameter: a dtype, its name, or a case that names it as its own."""
    found = [getattr(value, "dtype", value) for value in parameters(item)]
    names = [value for value in found if isinstance(value, str)]
    return (
        item.get_closest_marker("float64") is not None
        or "float64" in names
        or any(type(v) is type(mx.float64) and v == mx.float64 for v in found)
    )


@cache
def shaders() -> str:
    """All shaders, compiled for the simulator from the text that the extension holds: a path."""
    instantiations = [text for _, text in operations.shader_kernels()]
    return str(compile_library(operations.shader_source, instantiations).path)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend of this test, which all operations on the default device use."""
    name: str = getattr(request, "param", "cpu")
    mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)
    if name == "sim":
        number = zlib.crc32(f"{request.path.name}::{request.node.name}".encode()) + SEED
        values = ("SEED", number % SIMULATOR_SEEDS), ("FTZ", number // SIMULATOR_SEEDS % 2)
        for variable, value in values:
            if f"MLX_WELFORD_SIM_{variable}" not in os.environ:
                monkeypatch.setenv(f"MLX_WELFORD_SIM_{variable}", str(value))
        operations.simulate_with(shaders())
    yield name
    mx.set_default_device(mx.cpu)
    if name == "sim":
        operations.simulate_with(None)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers whichever tests are selected."""
    mx.random.seed(SEED)
    np.random.seed(SEED % 2**32)  # noqa: NPY002 (what a library draws from without being told)
    random.seed(SEED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails says which seeds it ran with."""
    report = yield
    if report.failed:
        names = ("MLX_WELFORD_SIM_SEED", "MLX_WELFORD_SIM_FTZ")
        values = [f"MLX_WELFORD_TEST_SEED={SEED}"]
        values += [f"{name}={os.environ[name]}" for name in names if name in os.environ]
        report.sections.append(("seeds", " ".join(values)))
    return report
