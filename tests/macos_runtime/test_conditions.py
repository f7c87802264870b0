"""Conditions that a Mac may present, planted in the stand-in for Metal."""

import os

import macos_host  # type: ignore[import-not-found]
import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest

from macos_runtime.children import PROBLEMS, Problem, normalize, run

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


@pytest.mark.parametrize("threads", [32, 256, 640, 832])
@every_problem
def test_pipelines_that_allow_fewer_threads(problem: Problem, threads: int) -> None:
    """Kernels that need many registers: the plan is made again for what they allow."""
    y, grad, done = normalize(problem, metal=f"max_threads={threads}")
    assert y < 5e-6
    assert grad < 1e-5
    assert "macOS runtime" not in done.stderr


@pytest.mark.parametrize("order", ["reversed", "1", "2"])
@every_problem
def test_dispatches_in_another_order(problem: Problem, order: str) -> None:
    """Those that no barrier orders."""
    y, grad, _ = normalize(problem, metal=f"order={order}")
    assert y < 5e-6
    assert grad < 1e-5


@pytest.mark.parametrize("order", ["", "reversed"])
@pytest.mark.parametrize("call", ["mw.batch_norm(x)[0]", "mw.group_norm(x, 4)"])
def test_a_removed_barrier_is_found(call: str, order: str) -> None:
    program = """
        import mlx.core as mx, mlx_welford as mw
        x = mx.random.normal((2, 1100, 24))
        mx.eval(CALL)
    """
    done = run(program.replace("CALL", call), metal=f"barriers=0,order={order}")
    assert "a hazard: " in done.stderr
    assert "and nothing orders them" in done.stderr


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@every_problem
def test_a_shader_that_does_not_compile(problem: Problem, aligned: bool) -> None:
    """One warning, with the compiler's log; then MLX's own operations."""
    start = 0 if aligned else 1
    more = f"""
        v = mx.array(np.arange(1, 4097, dtype=np.float32))[{start}:{start} + 4080].reshape(255, 16)
        for _ in range(3):
            y = mw.batch_norm(v)[0]
            mx.eval(y)
        v = np.array(v).astype(np.float64)
        print("view", float(np.abs(np.array(y) - (v - v.mean(0)) / v.std(0)).max()))
    """
    y, grad, done = normalize(problem, metal="compile_fails=1", more=more)
    assert y < 1e-5
    assert grad < 1e-5
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("view"))
    assert float(line.split()[1]) < 1e-4
    assert done.stderr.count("a shader does not compile") == 1
    assert "a planted error" in done.stderr


def test_a_shader_that_does_not_compile_is_an_error_if_asked_for() -> None:
    program = (
        "import mlx.core as mx, mlx_welford as mw; mx.eval(mw.batch_norm(mx.zeros((4, 4)))[0])"
    )
    done = run(program, metal="compile_fails=1", environment={"MLX_WELFORD_STRICT": "1"})
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr
    assert "a planted error" in done.stderr


def test_a_fault_of_the_gpu_is_a_python_error() -> None:
    program = """
        import mlx.core as mx, mlx_welford as mw
        try:
            mx.eval(mw.batch_norm(mx.random.normal((64, 33, 5)))[0])
            mx.synchronize()
            mx.eval(mx.zeros(3) + 1)
            mx.synchronize()
        except RuntimeError as error:
            print("raised", error)
    """
    done = run(program, metal="fault=normalize")
    assert "raised" in done.stdout
    assert "a planted fault of the GPU" in done.stdout


def test_a_kernel_that_cannot_be_had_is_an_error_of_its_operation() -> None:
    """And of nothing that comes after it."""
    with pytest.raises(RuntimeError, match="is not translated"):
        mx.eval(mx.fft.fft(mx.zeros((64,))))
    np.testing.assert_array_equal(np.array(mx.zeros(3) + 1), 1)
    macos_host.reports()


def test_function_constants_of_a_library_made_from_source() -> None:
    """An int and a float; two pipelines of one kernel keep their own."""
    line = 0.5 * np.arange(64) + 3
    np.testing.assert_array_equal(macos_host.specialized(3, 0.5), [*line, *-line])


@pytest.mark.parametrize(("system", "version"), [("14", "3.1"), ("15", "3.2"), ("26", "4.0")])
def test_the_system_decides_on_the_language(system: str, version: str) -> None:
    if int(system) < int(os.environ["MLX_WELFORD_MACOS"]):
        pytest.skip("these wheels of MLX are for a newer system")
    program = """
        import mlx.core as mx, mlx_welford as mw, macos_host
        mx.eval(mw.batch_norm(mx.random.normal((64, 33, 5)))[0])
        print(mw.status()["system"], macos_host.languages())
    """
    done = run(program, environment={"MLX_WELFORD_MACOS": system})
    assert f"macOS {system}.0" in done.stdout, done.stderr
    assert f"['{version}']" in done.stdout


def test_objects_do_not_pile_up() -> None:
    """After each step there are as many Objective-C objects as before it."""
    x = mx.random.normal((16, 33, 5))

    def step() -> None:
        y, gradient = mx.value_and_grad(lambda x: mw.batch_norm(x)[0].sum())(x)
        mx.eval(y, gradient)
        mx.synchronize()

    mx.set_cache_limit(0)
    for _ in range(3):
        step()
    before = macos_host.alive()
    for _ in range(10):
        step()
    after = macos_host.alive()
    grown = {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}
    assert all(n <= 2 for n in grown.values()), grown  # those of the last step may be in flight


def test_temporaries_outlive_their_use() -> None:
    """Without MLX's cache a buffer is released, and poisoned, as soon as nobody holds it."""
    before = mx.set_cache_limit(0)
    try:
        for _ in range(4):
            x = mx.random.normal((64, 16, 16, 32)) + 3
            y = mw.batch_norm(x)[0]
            mx.eval(y)
            assert abs(float(np.array(y.mean()))) < 1e-5
            assert float(np.array(y.var())) == pytest.approx(1, abs=1e-3)
    finally:
        mx.set_cache_limit(before)


def test_an_empty_batch_of_a_function_traced_for_any_shape() -> None:
    """Statistics of no instance have no memory, but something must be bound for them."""
    layer = mw.InstanceNorm(4, track_running_stats=True)
    step = mx.compile(layer, inputs=layer.state, outputs=layer.state, shapeless=True)
    mx.eval(step(mx.ones((2, 3, 4)) * 5), layer.state)
    before = np.array(layer.running_mean)
    mx.eval(step(mx.zeros((0, 3, 4))), layer.state)
    np.testing.assert_array_equal(np.array(layer.running_mean), before)
    np.testing.assert_allclose(before, 0.5, rtol=1e-6)


def test_the_self_test_passes() -> None:
    """With its report, as a user with a Mac is asked to send it."""
    program = """
        import runpy, sys
        sys.argv = ["mlx_welford", "selftest", "--quick"]
        runpy.run_module("mlx_welford", run_name="__main__", alter_sys=True)
    """
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Simulated M1" in done.stdout
    assert "metal" in done.stdout
