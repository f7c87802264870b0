"""MLX's function transformations over our primitives: values, not just survival."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import graphs
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
import pytest
import reference
import systems
from problems import KINDS, LAYOUTS, SUBSETS, Case, Layout, Problem, drawn, draws
from reference import Array, Kind
from systems import System
from tolerance import Comparison, assert_as_good_as, assert_same_bits, wide
from trees import leaves, parameters_of

pytestmark = pytest.mark.every_backend


def assert_close(
    got: mx.array, expected: mx.array | Array, *, rtol: float = 2e-6, scale: float = 0.0
) -> None:
    """Equal within float32 rounding, at the magnitude of the largest value or of scale."""
    want = wide(expected) if isinstance(expected, mx.array) else expected
    scale = max(scale, float(abs(want).max(initial=0.0)))
    np.testing.assert_allclose(wide(got), want, rtol=0, atol=rtol * scale)


# vmap


@pytest.mark.parametrize("batched", SUBSETS, ids=",".join)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap(kind: Kind, layout: Layout, batched: tuple[str, ...]) -> None:
    """Mapped over any set of the arguments, equal to a loop over them."""
    case = layout(kind, (3, 9, 5))
    problem = Problem(case)
    system = systems.ours(kind, axis=case.axis)
    names = list(problem.inputs)
    many = {
        name: mx.random.normal((4, *a.shape)) if name in batched else a
        for name, a in problem.inputs.items()
    }
    in_axes = tuple(0 if name in batched else None for name in names)
    got = mx.vmap(system, in_axes=in_axes)(*many.values())
    for i in range(4):
        one = [a[i] if name in batched else a for name, a in many.items()]
        for g, expected in zip(got, system(*one), strict=True):
            # outputs that depend on no mapped argument are not mapped either
            assert_close(g[i] if g.ndim > expected.ndim else g, expected)


@pytest.mark.parametrize(
    ("in_axis", "out_axis"), [(0, 0), (1, 0), (2, 1), (3, 2), (-1, -1), (0, 3)]
)
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_any_axis(kind: Kind, axis: int, in_axis: int, out_axis: int) -> None:
    x = mx.random.normal((4, 5, 6, 7))

    def f(x: mx.array) -> mx.array:
        return systems.ours(kind, axis=axis)(x)[0]

    got = mx.vmap(f, in_axes=in_axis, out_axes=out_axis)(x)
    loop = mx.stack([f(mx.take(x, i, in_axis)) for i in range(x.shape[in_axis])], out_axis)
    assert got.shape == loop.shape
    assert_close(got, loop)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_the_gradient(kind: Kind, layout: Layout) -> None:
    """Per-example gradients with respect to every argument."""
    case = layout(kind, (3, 9, 5))
    system = systems.ours(kind, axis=case.axis)
    weight, bias = mx.random.normal((5,)), mx.random.normal((5,))
    xs, gys = mx.random.normal((4, *case.shape)), mx.random.normal((4, *case.shape))

    def gradients(x: mx.array, gy: mx.array) -> list[mx.array]:
        def loss(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
            return (system(x, weight, bias)[0] * gy).sum()

        return list(mx.grad(loss, argnums=(0, 1, 2))(x, weight, bias))

    got = mx.vmap(gradients)(xs, gys)
    for i in range(4):
        for g, expected in zip(got, gradients(xs[i], gys[i]), strict=True):
            assert_close(g[i], expected, rtol=1e-5)


def test_vmap_of_moments() -> None:
    x = mx.random.normal((4, 5, 6, 7))
    mean, var = mx.vmap(lambda x: mw.moments(x, (0, -1)))(x)
    for i in range(4):
        expected = mw.moments(x[i], (0, -1))
        assert_close(mean[i], expected[0])
        assert_close(var[i], expected[1])


def test_vmap_of_given_statistics() -> None:
    x, weight, bias = mx.random.normal((4, 5, 6)), mx.random.normal((6,)), mx.random.normal((6,))
    mean, var = mx.random.normal((3, 6)), mx.random.uniform(0.5, 2.0, (3, 6))

    def f(mean: mx.array, var: mx.array) -> mx.array:
        return mw.batch_norm(x, weight, bias, mean=mean, var=var)[0]

    got = mx.vmap(f)(mean, var)
    for i in range(3):
        assert_close(got[i], f(mean[i], var[i]))


# jvp


@pytest.mark.parametrize("names", SUBSETS, ids=",".join)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_jvp(kind: Kind, layout: Layout, names: tuple[str, ...]) -> None:
    case = layout(kind, (3, 33, 5))
    comparison = Comparison()
    for draw in draws(case):
        problem = Problem(case, draw=draw)
        rng = np.random.default_rng([2, draw])
        point = {name: problem.inputs[name] for name in names}
        tangents = [mx.array(rng.normal(size=a.shape), mx.float32) for a in point.values()]

        def run(
            system: System,
            problem: Problem = problem,
            point: dict[str, mx.array] = point,
            tangents: list[mx.array] = tangents,
        ) -> list[mx.array]:
            def f(*values: mx.array) -> list[mx.array]:
                return system(**{**problem.inputs, **dict(zip(point, values, strict=True))})

            return list(mx.jvp(f, list(point.values()), tangents)[1])

        ours = run(systems.ours(kind, axis=case.axis))
        theirs = run(systems.baseline(kind, axis=case.axis))
        at = [wide(a) for a in problem.inputs.values()]
        known = dict(zip(names, tangents, strict=True))
        direction = [wide(known[n]) if n in known else None for n in problem.inputs]
        for i, name in enumerate(("y", "mean", "var")[: len(ours)]):
            truth = reference.directional(
                lambda x, w, b, i=i: reference.forward(kind, x, w, b, case.eps, case.axis)[i],
                at,
                direction,
            )
            comparison.add(f"tangent of {name}", ours[i], theirs[i], truth, mx.float32)
    comparison.check()


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_jvp_of_moments(axes: tuple[int, ...]) -> None:
    x, dx = mx.random.normal((5, 6, 7)), mx.random.normal((5, 6, 7))
    _, ours = mx.jvp(lambda x: list(mw.moments(x, axes)), [x], [dx])
    _, theirs = mx.jvp(lambda x: list(systems.statistics(x, axes)), [x], [dx])
    for i, name in enumerate(["mean", "var"]):
        truth = reference.directional(
            lambda x, i=i: reference.moments(x, axes)[i], [wide(x)], [wide(dx)]
        )
        assert_as_good_as(ours[i], theirs[i], truth, mx.float32, name=f"tangent of {name}")


def test_jvp_of_given_statistics() -> None:
    shapes = {"x": (4, 9, 7), "weight": (7,), "bias": (7,), "mean": (7,), "var": (7,)}
    primals = [mx.random.normal(s) for s in shapes.values()]
    primals[-1] = mx.random.uniform(0.5, 2.0, (7,))
    tangents = [mx.random.normal(s) for s in shapes.values()]

    def ours(*a: mx.array) -> list[mx.array]:
        x, weight, bias, mean, var = a
        return [mw.batch_norm(x, weight, bias, mean=mean, var=var)[0]]

    def theirs(*a: mx.array) -> list[mx.array]:
        return [systems.evaluation_baseline(*a)]

    _, got = mx.jvp(ours, primals, tangents)
    _, base = mx.jvp(theirs, primals, tangents)
    truth = reference.directional(
        lambda x, w, b, mean, var: reference.evaluate(x, w, b, mean, var, 1e-5, -1),
        [wide(a) for a in primals],
        [wide(a) for a in tangents],
    )
    assert_as_good_as(got[0], base[0], truth, mx.float32, name="tangent of y")


# second derivatives


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "statistics"),
    [
        pytest.param("batch", False, id="batch-y"),
        pytest.param("batch", True, id="batch-y-mean-var"),
        pytest.param("instance", False, id="instance-y"),
    ],
)
def test_gradient_penalty(kind: Kind, layout: Layout, statistics: bool, dtype: str) -> None:
    """The gradient of |grad x|^2 with respect to x, weight and the cotangent."""
    case = layout(kind, (3, 9, 5), dtype)
    comparison = Comparison()
    for problem in drawn(case):
        inputs = [problem.inputs["x"], problem.inputs["weight"], problem.gy]
        bias, others = problem.inputs["bias"], problem.cotangents[1:] if statistics else []
        ours, theirs = (
            penalty(system(kind, axis=case.axis), bias, others, inputs)
            for system in (systems.ours, systems.baseline)
        )
        x, weight, *cotangents = (wide(a) for a in (*inputs, *others))
        truth = reference.gradient_penalty(kind, x, weight, case.eps, case.axis, *cotangents)
        for i, (name, true) in enumerate(truth._asdict().items()):
            comparison.add(name, ours[i], theirs[i], np.asarray(true), problem.dtype)
    comparison.check()


def penalty(
    system: System, bias: mx.array, others: list[mx.array], inputs: list[mx.array]
) -> list[mx.array]:
    """|grad x|^2 for cotangents gy of y and others of mean and var, and its gradients.

    inputs are x, weight and gy, which it is differentiated with respect to.
    """

    def square(x: mx.array, weight: mx.array, gy: mx.array) -> mx.array:
        def f(x: mx.array) -> list[mx.array]:
            return system(x, weight, bias)[: 1 + len(others)]

        gx: mx.array = mx.vjp(f, [x], [gy, *others])[1][0]
        return (gx**2).sum()

    value, grads = mx.value_and_grad(square, argnums=(0, 1, 2))(*inputs)
    return [value, *grads]


def test_critic_with_a_gradient_penalty_learns_as_with_mlx_nn() -> None:
    """Two steps of a critic whose loss holds the norm of its input gradient (WGAN-GP)."""
    images = mx.random.normal((4, 6, 6, 3))

    def train(norm: Callable[[int], nn.Module]) -> dict[str, mx.array]:
        mx.random.seed(3)
        critic = nn.Sequential(
            nn.Conv2d(3, 8, 3), norm(8), nn.Softplus(), nn.Conv2d(8, 1, 3), norm(1), nn.Softplus()
        )
        optimizer = optim.SGD(1e-2)

        def loss(critic: nn.Module, x: mx.array) -> mx.array:
            def scores(x: mx.array) -> mx.array:
                y: mx.array = critic(x)
                return (y**2).sum()

            gx: mx.array = mx.grad(scores)(x)
            slopes = gx.square().sum((1, 2, 3)).sqrt()
            return scores(x) + 10 * ((slopes - 1) ** 2).mean()

        for _ in range(2):
            optimizer.update(critic, nn.value_and_grad(critic, loss)(critic, images)[1])
        mx.eval(critic.parameters())
        return parameters_of(critic)

    ours = train(lambda c: mw.InstanceNorm(c, affine=True))
    theirs = train(lambda c: nn.InstanceNorm(c, affine=True))
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        assert_close(a, theirs[name], rtol=1e-5, scale=1.0)


# checkpoint


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_gives_the_same_gradients(
    kind: Kind, activation: str | None, residual: bool
) -> None:
    problem = Problem(Case(kind, (3, 9, 5)))

    def loss(x: mx.array, weight: mx.array, bias: mx.array, r: mx.array) -> mx.array:
        epilogue: dict[str, Any] = {"activation": activation, "residual": r if residual else None}
        return (systems.ours(kind, **epilogue)(x, weight, bias)[0] ** 3).sum()

    inputs = [*problem.inputs.values(), problem.gy]
    plain = mx.grad(loss, argnums=(0, 1, 2, 3))(*inputs)
    again = mx.grad(mx.checkpoint(loss), argnums=(0, 1, 2, 3))(*inputs)
    for a, b in zip(again, plain, strict=True):
        assert_same_bits(a, b)


def checkpointed_step(layer: nn.Module, x: mx.array) -> tuple[mx.array, mx.array]:
    """The loss of a checkpointed layer and its gradient with respect to x."""
    block = nn.utils.checkpoint(layer)
    value, gradient = mx.value_and_grad(lambda x: (block(x) ** 2 * x).sum())(x)
    mx.eval(value, gradient, layer.parameters())
    return value, gradient


@pytest.mark.since("0.32.1", "the running variance of mlx.nn was the biased one")
def test_checkpoint_of_a_layer_updates_running_statistics_as_mlx_nn() -> None:
    """The forward pass runs twice, and mlx.nn counts both; the results are those of one pass."""
    x = mx.random.normal((3, 9, 5)) + 1
    ours, theirs = mw.BatchNorm(5), nn.BatchNorm(5)
    value, gradient = checkpointed_step(ours, x)
    base_value, base_gradient = checkpointed_step(theirs, x)
    assert_close(value, base_value)
    assert_close(gradient, base_gradient, rtol=1e-5)
    assert_close(ours.running_mean, theirs.running_mean)
    assert_close(ours.running_var, theirs.running_var)
    truth = reference.Running(np.zeros(5), np.ones(5))
    for _ in range(2):
        truth = reference.running("batch", truth, wide(x), 0.1, -1)
    assert_close(ours.running_mean, truth.mean)


@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("evaluated", range(3))
def test_gradients_of_what_was_evaluated_on_the_way(evaluated: int, wanted: int) -> None:
    """Evaluating one result of an operation leaves the graph of the others as it is."""
    x, g = mx.random.normal((3, 9, 5)), mx.random.normal((3, 9, 5))

    def f(x: mx.array, when: bool) -> mx.array:
        results = mw.batch_norm(x)
        if when:
            mx.eval(results[evaluated])
        return (results[wanted] * g).sum()

    expected = mx.grad(f)(x, False)
    assert np.abs(wide(expected)).max() > 1e-3
    assert_same_bits(mx.grad(f)(x, True), expected)


# compile


@pytest.mark.since("0.32.0", "mx.compile rounded otherwise than the interpreter")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_forward_and_backward(kind: Kind, layout: Layout, dtype: str) -> None:
    problem = Problem(layout(kind, (3, 33, 7), dtype))
    system = systems.ours(kind, axis=problem.case.axis)

    def f(x: mx.array, weight: mx.array, bias: mx.array, gy: mx.array) -> list[mx.array]:
        y, grads = mx.vjp(lambda *a: system(*a)[:1], [x, weight, bias], [gy])
        return [*y, *grads]

    compiled = mx.compile(f)
    arguments = [*problem.inputs.values(), problem.gy]
    for _ in range(2):
        for got, expected in zip(compiled(*arguments), f(*arguments), strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_once_for_all_shapes(kind: Kind) -> None:
    """shapeless: output shapes follow from the input shapes without another trace."""
    traces = []

    def f(x: mx.array) -> list[mx.array]:
        traces.append(x.shape)
        return systems.ours(kind)(mx.abs(x))

    compiled = mx.compile(f, shapeless=True)
    for shape in ((3, 9, 5), (2, 33, 7), (31, 4, 1)):
        x = mx.random.normal(shape)
        for got, expected in zip(compiled(x), f(x), strict=True):
            assert got.shape == expected.shape
            assert_close(got, expected)
    assert len(traces) == 1 + 3  # one for the compiled function, three for the plain calls


def primitives(outputs: Sequence[mx.array]) -> int:
    """How many of our primitives a graph holds."""
    return sum(name.startswith("Welford") for name in graphs.nodes(*outputs))


@pytest.mark.kernels("their nodes in MLX's graph")
@pytest.mark.parametrize(
    ("other", "nodes"),
    [
        ({}, 1),
        ({"eps": 1e-3}, 2),
        ({"axis": 1}, 2),
        ({"activation": "silu"}, 2),
        ({"negative_slope": 0.3}, 1),  # of no activation
    ],
    ids=["equal", "another-eps", "another-axis", "another-activation", "unused-slope"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_compile_merges_equal_nodes(kind: Kind, other: dict[str, Any], nodes: int) -> None:
    """The same normalisation twice is done once; a different one is another one."""

    def f(x: mx.array) -> list[mx.array]:
        first, second = systems.ours(kind)(x)[0], systems.ours(kind, **other)(x)[0]
        return [mx.exp(first), mx.sin(second)]

    x = mx.random.normal((3, 9, 5))
    assert primitives(f(x)) == 2
    compiled = mx.compile(f)(x)
    assert primitives(compiled) == nodes
    for got, expected in zip(compiled, f(x), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.kernels("their nodes in MLX's graph")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_has_no_needless_nodes(kind: Kind) -> None:
    """Copies are how MLX marks what it differentiates: they share memory."""
    x, weight, bias, g = mx.random.normal((3, 9, 5)), mx.ones(5), mx.zeros(5), mx.ones((3, 9, 5))
    mx.eval(x, weight, bias, g)

    def y(*arguments: mx.array) -> mx.array:
        return systems.ours(kind)(*arguments)[0]

    outputs, gradients = mx.vjp(y, [x, weight, bias], [g])
    assert sorted(graphs.nodes(*outputs, *gradients)) == [
        *["Broadcast"] * 2,  # zeros, as the cotangents of mean and variance
        *["Copy"] * 3,
        *["Full"] * 2,
        "WelfordNormalize",
        "WelfordNormalizeGradient",
    ]


@pytest.mark.kernels("their nodes in MLX's graph")
@pytest.mark.parametrize(
    ("axes", "nodes"),
    [((0, 1), 1), ((1,), 2), ((1, 2), 2)],
    ids=["equal", "fewer-axes", "other-axes"],
)
def test_compile_merges_equal_moments(axes: tuple[int, ...], nodes: int) -> None:
    def f(x: mx.array) -> list[mx.array]:
        return [mx.exp(mw.moments(x, (0, 1))[0]), mx.sin(mw.moments(x, axes)[1])]

    x = mx.random.normal((3, 9, 5))
    assert primitives(f(x)) == 2
    compiled = mx.compile(f)(x)
    assert primitives(compiled) == nodes
    for got, expected in zip(compiled, f(x), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.kernels("their nodes in MLX's graph")
def test_compile_merges_equal_gradients() -> None:
    """Two losses through one layer: one forward pass, a backward pass for each cotangent."""
    weight = mx.random.normal((5,))
    mx.eval(weight)  # MLX before 0.32.3 would compile its graph too, which rounds differently

    def f(x: mx.array, a: mx.array, b: mx.array) -> list[mx.array]:
        def gradient(gy: mx.array) -> mx.array:
            return mx.vjp(lambda x: [mw.instance_norm(x, weight)], [x], [gy])[1][0]

        return [mx.exp(gradient(a)), mx.sin(gradient(a)), mx.exp(gradient(b))]

    arguments = [mx.random.normal((3, 9, 5)) for _ in range(3)]
    assert primitives(f(*arguments)) == 6
    compiled = mx.compile(f)(*arguments)
    assert primitives(compiled) == 3
    for got, expected in zip(compiled, f(*arguments), strict=True):
        assert_same_bits(got, expected)


def network(norm: Callable[[int], nn.Module]) -> nn.Module:
    mx.random.seed(1)
    # Before a normalisation the gradient of a bias is rounding, which Adam scales to whole steps.
    first, second = (nn.Conv2d(*channels, 3, bias=False) for channels in ((3, 8), (8, 4)))
    return nn.Sequential(first, norm(8), nn.ReLU(), second, norm(4))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": mw.BatchNorm,
    "instance": partial(mw.InstanceNorm, affine=True),
    "instance-running": partial(mw.InstanceNorm, affine=True, track_running_stats=True),
}


@pytest.mark.since("0.32.0", "mx.compile rounded otherwise than the interpreter")
@pytest.mark.parametrize("norm", NORMS)
def test_compiled_training_step_with_captured_state(norm: str) -> None:
    """inputs and outputs hold the model's state: running statistics advance at every call."""
    batches = [mx.random.normal((4, 8, 8, 3)) for _ in range(4)]

    def train(compile_: bool) -> tuple[list[int | float | complex], dict[str, mx.array]]:
        model = network(NORMS[norm])
        optimizer = optim.Adam(1e-2)
        state = [model.state, optimizer.state]

        def loss(model: nn.Module, x: mx.array) -> mx.array:
            y: mx.array = model(x)
            return ((y - 0.5) ** 2 * mx.arange(4)).mean()

        def step(x: mx.array) -> mx.array:
            value, grads = nn.value_and_grad(model, loss)(model, x)
            optimizer.update(model, grads)
            result: mx.array = value
            return result

        run = mx.compile(step, inputs=state, outputs=state) if compile_ else step
        losses = []
        for x in batches:
            losses.append(run(x).item())
            mx.eval(state)
        return losses, parameters_of(model)

    losses, parameters = train(compile_=True)
    plain_losses, plain_parameters = train(compile_=False)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-4)
    assert parameters.keys() == plain_parameters.keys()
    for name, a in parameters.items():
        assert_close(a, plain_parameters[name], rtol=1e-3, scale=1.0)
    if norm != "instance":
        before = parameters_of(network(NORMS[norm]))
        name = "layers.1.running_mean"
        assert not mx.array_equal(before[name], parameters[name])


def test_compiled_evaluation_sees_new_running_statistics() -> None:
    """State is an input of the compiled function, not a constant in it."""
    layer = mw.BatchNorm(5, momentum=1.0)
    x = mx.random.normal((4, 9, 5)) * 2 + 3
    layer.eval()
    compiled = mx.compile(layer.__call__, inputs=layer.state)
    first = compiled(x)
    assert_close(first, wide(x) / np.sqrt(1 + 1e-5))
    layer.train()
    layer(x)
    layer.eval()
    assert_close(compiled(x), layer(x))


# value_and_grad


@pytest.mark.since("0.32.1", "the running variance of mlx.nn was the biased one")
def test_value_and_grad_of_a_model() -> None:
    """Gradients of weights and biases alone, equal to those of mlx.nn; statistics are updated."""
    x = mx.random.normal((4, 8, 8, 3))

    def step(norm: Callable[[int], nn.Module]) -> tuple[mx.array, dict[str, mx.array], nn.Module]:
        model = network(norm)

        def loss(x: mx.array) -> mx.array:
            y: mx.array = model(x)
            return (y**2 * x[:, :4, :4, :1]).sum()

        value, grads = nn.value_and_grad(model, loss)(x)
        return value, leaves(grads), model

    value, grads, model = step(mw.BatchNorm)
    base_value, base_grads, base_model = step(nn.BatchNorm)
    assert_close(value, base_value, rtol=1e-4)
    assert grads.keys() == base_grads.keys()
    assert not any("running" in name for name in grads)
    for name, gradient in grads.items():
        assert_close(gradient, base_grads[name], rtol=1e-4, scale=1.0)
    assert_close(model.layers[1].running_var, base_model.layers[1].running_var)
    assert not mx.array_equal(model.layers[1].running_var, mx.ones((8,)))


def test_running_statistics_can_be_used_after_the_gradient_is_taken() -> None:
    """They are arrays like any other: no tracer and no graph of the step before hangs on them."""
    layer = mw.BatchNorm(3)
    x = mx.random.normal((9, 3))
    mx.grad(lambda x: (layer(x) ** 3).sum())(x)
    kept = layer.running_mean * 2
    truth = reference.running("batch", reference.Running(np.zeros(3), np.ones(3)), wide(x), 0.1, -1)
    assert_close(kept, 2 * truth.mean)


def test_running_statistics_pass_no_gradient() -> None:
    """As data of the layer they are constants of the loss, as in torch."""
    layer = mw.BatchNorm(3)

    def loss(x: mx.array) -> mx.array:
        layer(x)
        return (layer.running_mean + layer.running_var).sum()

    gradient = mx.grad(loss)(mx.random.normal((9, 3)))
    assert_same_bits(gradient, mx.zeros((9, 3)), "grad x")
