"""Settings that every test shares, and the backends that tests run on.

A module marked ``every_backend`` runs once for each backend that is present: the CPU's kernels, the
shaders in the simulator (on Linux), and the shaders on a Mac's GPU. ``--backend`` chooses among
them. Tests without that mark, and fixtures of modules, run on the CPU, also where MLX's default is
the GPU.

MLX has no float64 on a GPU. Tests with a parameter of that dtype, or marked ``float64``, are
skipped there; tests that draw a dtype by themselves take it from ``problems.dtypes()``.

In the simulator the seed that orders the threads and whether denormals are flushed vary from test
to test, unless MLX_WELFORD_SIM_SEED and MLX_WELFORD_SIM_FTZ are set.
"""

import os
import sys
import zlib
from collections.abc import Iterator
from functools import cache

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings
from mlx_welford import _ext
from problems import FLOAT64_IS_NOT_ON_GPU
from simulator.loader import compile_library

BACKENDS = ("cpu", "sim", "gpu")
SEEDS = 3

settings.register_profile(
    "suite",
    deadline=None,  # the first example pays for thread start-up and page faults
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=BACKENDS,
        help="run on this backend alone; may be given again (default: all that are present)",
    )


def pytest_configure() -> None:
    mx.set_default_device(mx.cpu)


def has_metal() -> bool:
    """Whether there is a Metal device: MLX for macOS calls Metal available even where none is."""
    return mx.metal.is_available() and mx.is_available(mx.gpu)


def present() -> list[str]:
    """The backends here. MLX_WELFORD_REQUIRE_GPU=1 makes a missing GPU an error."""
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
            raise pytest.UsageError(f"--backend {name}: there is none on this machine.")
    return asked or present()


def pytest_report_header(config: pytest.Config) -> str:
    missing = [name for name in BACKENDS if name not in chosen(config)]
    return f"backends: {', '.join(chosen(config))}; not run: {', '.join(missing) or 'none'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("every_backend"):
        metafunc.parametrize("backend", chosen(metafunc.config), indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in backends_of(item) and needs_float64(item):
            item.add_marker(pytest.mark.skip(reason=FLOAT64_IS_NOT_ON_GPU))


def parameters(item: pytest.Item) -> list[object]:
    return list(getattr(getattr(item, "callspec", None), "params", {}).values())


def backends_of(item: pytest.Item) -> list[object]:
    """Its parameters that name a backend, themselves or in an attribute of that name."""
    return [getattr(value, "backend", value) for value in parameters(item)]


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
    instantiations = [text for _, text in _ext.shader_kernels()]
    return str(compile_library(_ext.shader_source, instantiations).path)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend of this test, which all operations on the default device use."""
    name: str = getattr(request, "param", "cpu")
    mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)
    if name == "sim":
        number = zlib.crc32(request.node.nodeid.encode())
        for variable, value in (("SEED", number % SEEDS), ("FTZ", number // SEEDS % 2)):
            if f"MLX_WELFORD_SIM_{variable}" not in os.environ:
                monkeypatch.setenv(f"MLX_WELFORD_SIM_{variable}", str(value))
        _ext.simulate_with(shaders())
    yield name
    mx.set_default_device(mx.cpu)
    if name == "sim":
        _ext.simulate_with(None)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers whichever tests are selected."""
    mx.random.seed(0)
