"""Where a shader does not compile, MLX's own operations compute what it would have.

A library that lacks kernels plays the compiler that refuses them: the decision is that of the
Metal backend (csrc/gpu/compilation.cpp). What arrays only show when they are evaluated, that a view
begins where vectors are not aligned, leads to kernels that nobody has tried before.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial

import graphs
import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import reference
from mlx_welford import _ext
from plans import shaders
from processes import run
from simulator.loader import compile_library
from tolerance import assert_same_bits, wide


def library_without(pattern: str) -> str:
    """The shaders but those whose name matches: a path."""
    kept = [text for name, text in _ext.shader_kernels() if not re.search(pattern, name)]
    assert len(kept) < len(_ext.shader_kernels())
    return str(compile_library(_ext.shader_source, kept).path)


@pytest.fixture
def only_aligned() -> Iterator[None]:
    """Of those that walk over arrays, the kernels of vectors alone compile."""
    _ext.simulate_with(library_without("_1_(Rows|Columns)$"))
    yield
    _ext.simulate_with(None)


def view(shape: tuple[int, ...]) -> mx.array:
    """Row-contiguous, four bytes behind a place where vectors are aligned."""
    size = int(np.prod(shape))
    whole = mx.random.normal((size + 1,)) + 2
    mx.eval(whole)
    return whole[1:].reshape(shape)


def ours(x: mx.array) -> list[mx.array]:
    weight = mx.arange(1, x.shape[-1] + 1).astype(mx.float32)
    y, gradients = mx.vjp(
        lambda x, weight: list(mw.batch_norm(x, weight)), [x, weight], [x, weight, weight]
    )
    return [*y, *gradients]


FUNCTIONS: dict[str, Callable[[mx.array], list[mx.array]]] = {
    "normalize": lambda x: list(mw.batch_norm(x)),
    "instances": lambda x: [mw.instance_norm(x, axis=1)],
    "moments": lambda x: list(mw.moments(x, (0, 2))),
    "gradients": ours,
    "gradients of moments": lambda x: [mx.grad(lambda x: mw.moments(x, 1)[1].sum())(x)],
    "evaluation": lambda x: [mw.batch_norm(x, mean=x[0, 0], var=x[0, 1] ** 2)[0]],
    "ranks": lambda x: [_ext.rank_moments(x, "test", -1)],
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("only_aligned")
def test_an_unaligned_view_is_computed_all_the_same(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    x = view((3, 12, 8))
    found = FUNCTIONS[name](x)
    assert any(node.startswith("Welford") for node in graphs.nodes(*found))  # nobody knows yet
    mx.eval(found)
    log = capfd.readouterr().err
    assert "a shader does not compile" in log
    assert re.search(r"there is no kernel '\w+_1_(Rows|Columns)'", log)

    _ext.simulate_with(None)
    expected = FUNCTIONS[name](mx.contiguous(x) + 0)
    for got, right in zip(found, expected, strict=True):
        assert got.shape == right.shape
        np.testing.assert_allclose(wide(got), wide(right), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.usefixtures("only_aligned")
def test_an_unaligned_cotangent_is_enough(given: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Vectors are read of both arrays or of none."""
    x, g = mx.random.normal((3, 12, 8)), view((3, 12, 8))
    mean, var = (mx.zeros(8), mx.ones(8)) if given else (None, None)
    mx.eval(x)
    _, (gradient,) = mx.vjp(lambda x: [mw.batch_norm(x, mean=mean, var=var)[0]], [x], [g])
    if given:
        expected = wide(g) / np.sqrt(1 + 1e-5)
    else:
        expected = reference.backward("batch", wide(x), None, 1e-5, -1, wide(g)).x
    np.testing.assert_allclose(wide(gradient), expected, rtol=1e-4, atol=1e-4)
    assert re.search(r"there is no kernel '\w+_1_Columns'", capfd.readouterr().err)


@pytest.mark.usefixtures("only_aligned")
def test_results_can_be_used_by_kernels(capfd: pytest.CaptureFixture[str]) -> None:
    """They lie in memory as those of kernels do; so do temporaries, whose memory they may take."""
    x = view((3, 12, 8))
    expected = reference.forward("batch", wide(x), None, None, 1e-5, -1).y
    expected = reference.forward("batch", expected, None, None, 1e-5, -1).y
    found = mw.batch_norm(mw.batch_norm(x)[0])[0]
    np.testing.assert_allclose(wide(found), expected, atol=1e-5)
    assert capfd.readouterr().err.count("a shader does not compile") == 1


@pytest.mark.usefixtures("only_aligned")
def test_from_then_on_everything_is_composed() -> None:
    aligned = mx.random.normal((3, 12, 8))
    assert "WelfordNormalize" in graphs.nodes(mw.batch_norm(aligned)[0])
    mx.eval(mw.batch_norm(view((3, 12, 8))))
    assert "WelfordNormalize" not in graphs.nodes(mw.batch_norm(aligned)[0])


THREADS = """
    import sys
    import threading
    import mlx.core as mx
    import mlx_welford as mw
    from mlx_welford import _ext

    _ext.simulate_with(sys.argv[1])
    kernels = threading.Barrier(4)  # until every graph has one
    done = threading.Event()

    def evaluate(evaluate):
        x = mx.arange(1, 1 + 3 * 12 * 8, dtype=mx.float32)
        mx.eval(x)
        y, mean, var = mw.batch_norm(mx.concatenate([x[:1], x])[1:].reshape(3, 12, 8))
        kernels.wait()
        evaluate(y, mean, var)
        assert abs(y.sum().item()) < 1e-3 and abs(mean[0].item() - 141) < 1e-3, (y, mean)

    def work():
        while not done.is_set():
            sum(range(1000))

    busy = threading.Thread(target=work)
    threads = [threading.Thread(target=evaluate, args=[f]) for f in [mx.eval, mx.async_eval] * 2]
    for thread in [busy, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    mx.async_eval(mw.moments(mx.random.normal((5, 7)).T, 0))  # still under way at the end
"""


def test_threads_take_the_fallback_while_another_has_the_gil() -> None:
    """Evaluation runs without it; the fallback is written in Python."""
    run(THREADS, library_without("_1_(Rows|Columns)$"))


@pytest.mark.usefixtures("only_aligned")
def test_strict_makes_it_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_WELFORD_STRICT", "1")
    y = mw.batch_norm(view((3, 12, 8)))[0]
    with pytest.raises(RuntimeError, match=r"does not compile\.\nthere is no kernel '\w+_1_Col"):
        mx.eval(y)


def test_a_kernel_that_every_array_needs_is_known_at_once() -> None:
    _ext.simulate_with(library_without("^fused_normalize"))
    try:
        x = mx.random.normal((3, 12, 8))
        y = mw.batch_norm(x)[0]
        assert not any(node.startswith("Welford") for node in graphs.nodes(y))
        expected = reference.forward("batch", wide(x), None, None, 1e-5, -1).y
        np.testing.assert_allclose(wide(y), expected, atol=1e-5)
    finally:
        _ext.simulate_with(None)


# ---- A node keeps its plan -----------------------------------------------------------------------


@pytest.fixture
def simulated() -> Iterator[None]:
    _ext.simulate_with(str(shaders().path))
    yield
    _ext.simulate_with(None)


def plans_made(run: Callable[[], object]) -> int:
    before = _ext.counted_plans()
    mx.eval(run())
    return _ext.counted_plans() - before


@pytest.mark.usefixtures("simulated")
def test_a_node_makes_one_plan() -> None:
    """At graph time, for evaluation as well."""
    x = mx.random.normal((3, 12, 8))
    assert plans_made(lambda: mw.batch_norm(x)) == 1
    assert plans_made(lambda: mw.moments(x, 0)) == 1
    assert plans_made(lambda: mx.grad(lambda x: mw.instance_norm(x).sum())(x)) == 2
    assert plans_made(lambda: mw.batch_norm(view((3, 12, 8)))) == 2  # unaligned: one of its own


@pytest.mark.usefixtures("simulated")
def test_a_compiled_graph_makes_its_plans_once() -> None:
    norm = mx.compile(mw.instance_norm)
    inputs = [mx.random.normal((3, 12, 8)) for _ in range(3)]
    assert [plans_made(partial(norm, x)) for x in inputs] == [1, 0, 0]
    assert [plans_made(lambda: norm(view((3, 12, 8)))) for _ in range(3)] == [1, 0, 0]
    _ext.simulate_with(str(shaders().path))  # perhaps of other kernels
    assert [plans_made(partial(norm, x)) for x in inputs] == [1, 0, 0]


@pytest.mark.usefixtures("simulated")
def test_a_graph_for_any_shape_makes_a_plan_for_each() -> None:
    norm = mx.compile(mw.instance_norm, shapeless=True)
    short, long = mx.random.normal((3, 12, 8)), mx.random.normal((2, 700, 8))
    expected = [mw.instance_norm(x) for x in (short, long)]
    mx.eval(expected)
    assert [plans_made(partial(norm, x)) for x in (short, short, long, long)] == [1, 0, 1, 0]
    for x, right in zip((short, long), expected, strict=True):
        assert_same_bits(norm(x), right)


@pytest.mark.parametrize("dtype", ["float64", "int32", "complex64", "uint16", "float", "half", ""])
def test_no_other_type_is_taken_for_one_that_has_kernels(dtype: str) -> None:
    with pytest.raises(ValueError, match="no kernels for this dtype"):
        _ext.launch_plan("moments", [8, 8], [0], dtype)
