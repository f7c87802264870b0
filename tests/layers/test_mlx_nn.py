"""Side by side with the mlx.nn layers of the same name, in float32 unless said otherwise."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
import pytest
import reference
from reference import Kind
from tolerance import assert_as_good_as, assert_same_bits, wide
from trees import leaves, parameters_of, trainable_of

pytestmark = pytest.mark.every_backend

Make = Callable[..., nn.Module]
PAIRS: dict[str, tuple[Kind, Make, Make]] = {
    "batch": ("batch", lambda: mw.BatchNorm(7), lambda: nn.BatchNorm(7)),
    "batch-plain": (
        "batch",
        lambda: mw.BatchNorm(7, affine=False),
        lambda: nn.BatchNorm(7, affine=False),
    ),
    "batch-untracked": (
        "batch",
        lambda: mw.BatchNorm(7, 1e-3, 0.3, True, False),
        lambda: nn.BatchNorm(7, 1e-3, 0.3, True, False),
    ),
    "batch-momentum": (
        "batch",
        lambda: mw.BatchNorm(7, momentum=0.7),
        lambda: nn.BatchNorm(7, momentum=0.7),
    ),
    "instance": ("instance", lambda: mw.InstanceNorm(7), lambda: nn.InstanceNorm(7)),
    "instance-affine": (
        "instance",
        lambda: mw.InstanceNorm(7, 1e-3, True),
        lambda: nn.InstanceNorm(7, 1e-3, True),
    ),
}
AFFINE = [name for name in PAIRS if name not in ("batch-plain", "instance")]
WITH_PARAMETERS = [*AFFINE, "batch-plain"]
SHAPES = [(32, 7), (3, 33, 7), (3, 9, 8, 7)]


def dtypes(layer: nn.Module) -> dict[str, mx.Dtype]:
    return {name: a.dtype for name, a in parameters_of(layer).items()}


def randomise(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Other values than 0 and 1 for every parameter; running statistics too."""
    rng = np.random.default_rng(seed)
    for name, a in parameters_of(layer).items():
        layer[name] = mx.array(rng.uniform(0.5, 1.5, a.shape), a.dtype)
    return layer


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[Kind, nn.Module, nn.Module]:
    kind, ours, theirs = PAIRS[request.param]
    return kind, randomise(ours()), randomise(theirs())


Pair = tuple[Kind, nn.Module, nn.Module]


@pytest.mark.since("0.32.1", "the running variance of mlx.nn was the biased one")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_training_steps_and_an_evaluation(pair: Pair, shape: tuple[int, ...]) -> None:
    """Outputs, gradients and running statistics, each against the truth as good as theirs."""
    kind, ours, theirs = pair
    if kind == "instance" and len(shape) < 3:
        shape = (32, 5, 7)
    eps = ours.eps
    weight = wide(ours.weight) if "weight" in ours else None
    bias = wide(ours.bias) if "bias" in ours else None
    rng = np.random.default_rng(1)
    for step in range(4):
        x = mx.array(rng.normal(1.0, 2.0, shape), mx.float32)
        gy = mx.array(rng.normal(size=shape), mx.float32)
        evaluating = step == 3
        ours.train(not evaluating)
        theirs.train(not evaluating)
        given = evaluating and "running_mean" in ours
        mean = wide(ours.running_mean) if given else np.zeros(7)
        var = wide(ours.running_var) if given else np.ones(7)
        results = []
        for layer in (ours, theirs):
            (y,), (gx,) = mx.vjp(lambda x, layer=layer: [layer(x)], [x], [gy])
            results.append((y, gx))
        (y, gx), (their_y, their_gx) = results
        if given:
            truth_y = reference.evaluate(wide(x), weight, bias, mean, var, eps, -1)
            truth_gx = reference.evaluate_backward(wide(x), weight, mean, var, eps, -1, wide(gy)).x
        else:
            truth_y = reference.forward(kind, wide(x), weight, bias, eps, -1).y
            truth_gx = reference.backward(kind, wide(x), weight, eps, -1, wide(gy)).x
        assert_as_good_as(y, their_y, truth_y, mx.float32, name=f"y {step}")
        assert_as_good_as(gx, their_gx, truth_gx, mx.float32, name=f"gx {step}")
        for name in ("running_mean", "running_var"):
            assert (name in ours) == (name in theirs)
            if name in ours:
                np.testing.assert_allclose(wide(ours[name]), wide(theirs[name]), rtol=2e-6)


@pytest.mark.parametrize("pair", AFFINE, indirect=True)
def test_gradients_of_the_parameters(pair: Pair) -> None:
    kind, ours, theirs = pair
    x, gy = mx.random.normal((3, 33, 7)), mx.random.normal((3, 33, 7))

    def gradients(layer: nn.Module) -> dict[str, mx.array]:
        _, grads = nn.value_and_grad(layer, lambda x: (layer(x) * gy).sum())(x)
        return leaves(grads)

    mine, base = gradients(ours), gradients(theirs)
    assert mine.keys() == base.keys()
    weight = wide(ours.weight) if "weight" in ours else None
    truth = reference.backward(kind, wide(x), weight, ours.eps, -1, wide(gy))
    for name in mine:
        assert_as_good_as(mine[name], base[name], getattr(truth, name), mx.float32, name=name)


def test_parameters_have_the_same_names_shapes_types_and_values(pair: Pair) -> None:
    _, ours, theirs = pair
    mine, base = parameters_of(ours), parameters_of(theirs)
    assert list(mine) == list(base)
    for name in mine:
        assert_same_bits(mine[name], base[name], name)


@pytest.mark.parametrize("name", PAIRS)
def test_initial_values(name: str) -> None:
    _, ours, theirs = PAIRS[name]
    mine, base = parameters_of(ours()), parameters_of(theirs())
    assert mine.keys() == base.keys()
    for key in mine:
        assert_same_bits(mine[key], base[key], key)


def test_repr(pair: Pair) -> None:
    _, ours, theirs = pair
    assert repr(ours) == repr(theirs)


def test_attributes(pair: Pair) -> None:
    kind, ours, theirs = pair
    names = ["eps", "num_features", "momentum", "track_running_stats"]
    for name in names if kind == "batch" else ["eps", "dims"]:
        assert getattr(ours, name) == getattr(theirs, name)


FREEZING: dict[str, Callable[[nn.Module], object]] = {
    "as-made": lambda layer: None,
    "freeze": lambda layer: layer.freeze(),
    "freeze-unfreeze": lambda layer: (layer.freeze(), layer.unfreeze()),
    "unfreeze": lambda layer: layer.unfreeze(),
    "unfreeze-not-recursively": lambda layer: layer.unfreeze(recurse=False),
    "unfreeze-running-mean": lambda layer: layer.unfreeze(keys="running_mean"),
    "unfreeze-running-both": lambda layer: layer.unfreeze(keys=["running_mean", "running_var"]),
    "freeze-weight": lambda layer: layer.freeze(keys="weight"),
    "freeze-unfreeze-bias": lambda layer: (layer.freeze(), layer.unfreeze(keys="bias")),
    "train-eval-train": lambda layer: (layer.train(), layer.eval(), layer.train()),
}


@pytest.mark.parametrize("name", FREEZING)
def test_frozen_parameters(pair: Pair, name: str) -> None:
    _, ours, theirs = pair
    FREEZING[name](ours)
    FREEZING[name](theirs)
    mine, base = trainable_of(ours), trainable_of(theirs)
    assert mine.keys() == base.keys()
    assert not {"running_mean", "running_var"} & mine.keys()


@pytest.mark.parametrize("name", FREEZING)
def test_frozen_parameters_within_a_model(name: str) -> None:
    """As mlx.nn's, but for running statistics, which a model's unfreeze makes trainable there."""
    ours = nn.Sequential(nn.Linear(7, 7), mw.BatchNorm(7))
    theirs = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm(7))
    FREEZING[name](ours)
    FREEZING[name](theirs)
    statistics = {"layers.1.running_mean", "layers.1.running_var"}
    mine, base = trainable_of(ours), trainable_of(theirs)
    assert mine.keys() == base.keys() - statistics


def test_freeze_and_unfreeze_return_the_layer() -> None:
    for layer in (mw.BatchNorm(7), mw.InstanceNorm(7, affine=True, track_running_stats=True)):
        assert layer.freeze() is layer
        assert layer.unfreeze() is layer


def test_train_and_eval_through_a_model() -> None:
    model = nn.Sequential(mw.BatchNorm(7), nn.Sequential(mw.InstanceNorm(7)))
    norms = [model.layers[0], model.layers[1].layers[0]]
    assert [n.training for n in norms] == [True, True]
    model.eval()
    assert [n.training for n in norms] == [False, False]
    model.train()
    assert [n.training for n in norms] == [True, True]


@pytest.mark.parametrize("pair", WITH_PARAMETERS, indirect=True)
@pytest.mark.parametrize("extension", ["npz", "safetensors"])
@pytest.mark.parametrize("direction", ["from-mlx.nn", "to-mlx.nn"])
def test_weights_load_both_ways(pair: Pair, direction: str, extension: str, tmp_path: Path) -> None:
    _, ours, theirs = pair
    source, target = (theirs, ours) if direction == "from-mlx.nn" else (ours, theirs)
    names = list(parameters_of(source))
    source.save_weights(str(tmp_path / f"weights.{extension}"))
    for name in names:
        target[name] = mx.zeros_like(target[name])
    target.load_weights(str(tmp_path / f"weights.{extension}"), strict=True)
    for name in names:
        assert_same_bits(target[name], source[name], name)
    source.eval()
    target.eval()
    x = mx.random.normal((3, 33, 7))
    np.testing.assert_allclose(wide(target(x)), wide(source(x)), rtol=1e-5, atol=2e-6)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    nn.BatchNorm(8).save_weights(str(tmp_path / "weights.npz"))
    with pytest.raises(ValueError, match="shape"):
        mw.BatchNorm(7).load_weights(str(tmp_path / "weights.npz"))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_set_dtype(pair: Pair, dtype: mx.Dtype) -> None:
    """Parameters and, with input of that type, results and running statistics keep it."""
    _, ours, theirs = pair
    ours.set_dtype(dtype)
    theirs.set_dtype(dtype)
    assert dtypes(ours) == dtypes(theirs)
    x = mx.random.normal((3, 33, 7)).astype(dtype)
    assert ours(x).dtype == theirs(x).dtype == dtype
    assert dtypes(ours) == dtypes(theirs)
    ours.eval()
    theirs.eval()
    assert ours(x).dtype == theirs(x).dtype == dtype


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_input_to_a_float32_layer(pair: Pair, dtype: mx.Dtype) -> None:
    """The result has the type of x, weight and bias together."""
    _, ours, theirs = pair
    x = mx.random.normal((3, 33, 7)).astype(dtype)
    expected = mx.float32 if "weight" in ours else dtype
    assert ours(x).dtype == theirs(x).dtype == expected
    # In evaluation mlx.nn's running statistics, float32, count for the type; ours do not.
    assert ours.eval()(x).dtype == expected


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies(pair: Pair, clone: Callable[[nn.Module], nn.Module]) -> None:
    _, ours, _ = pair
    x = mx.random.normal((3, 33, 7))
    twin = clone(ours)
    assert repr(twin) == repr(ours)
    assert trainable_of(twin).keys() == trainable_of(ours).keys()
    assert_same_bits(twin(x), ours(x), "y")
    for name, a in parameters_of(ours).items():
        assert_same_bits(parameters_of(twin)[name], a, name)
    if "running_mean" in ours:
        before = ours.running_mean.tolist()
        twin(x)
        assert ours.running_mean.tolist() == before
        assert twin.running_mean.tolist() != before


def train(norm: Callable[[int], nn.Module], steps: int) -> tuple[list[float], nn.Module]:
    """A small convolutional network on fixed data, from a fixed seed."""
    mx.random.seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
    )
    optimizer = optim.SGD(0.05, momentum=0.9)
    rng = np.random.default_rng(0)
    labels = mx.array(rng.integers(0, 4, 16))
    centres = rng.normal(size=(4, 7, 7, 3))

    def loss(model: nn.Module, x: mx.array) -> mx.array:
        scores = model(x).mean((1, 2))
        return nn.losses.cross_entropy(scores, labels, reduction="mean")

    losses = []
    for _ in range(steps):
        x = mx.array(centres[np.array(labels)] + rng.normal(size=(16, 7, 7, 3)), mx.float32)
        value, grads = nn.value_and_grad(model, loss)(model, x)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    return losses, model


@pytest.mark.since("0.32.1", "the running variance of mlx.nn was the biased one")
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_training_follows_the_same_course(kind: Kind) -> None:
    make: dict[Kind, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
        "batch": (mw.BatchNorm, nn.BatchNorm),
        "instance": (
            lambda c: mw.InstanceNorm(c, affine=True),
            lambda c: nn.InstanceNorm(c, affine=True),
        ),
    }
    ours, model = train(make[kind][0], 15)
    theirs, base = train(make[kind][1], 15)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    assert ours[-1] < ours[0] / 2
    mine, expected = parameters_of(model), parameters_of(base)
    assert mine.keys() == expected.keys()
    for name in mine:
        np.testing.assert_allclose(wide(mine[name]), wide(expected[name]), atol=2e-3, err_msg=name)


@pytest.mark.since("0.32.1", "the running variance of mlx.nn was the biased one")
def test_gradient_accumulation_follows_the_same_course() -> None:
    """Two micro-batches a step: gradients are added, running statistics advance twice."""
    batches = [mx.random.normal((4, 9, 7)) for _ in range(6)]

    def run(layer: nn.Module) -> dict[str, mx.array]:
        optimizer = optim.SGD(0.1)
        step = nn.value_and_grad(layer, lambda x: (layer(x) ** 3 * x).sum())
        for i in range(0, 6, 2):
            first, second = (leaves(step(batches[i + k])[1]) for k in range(2))
            total = {name: (first[name] + second[name]) / 100 for name in first}
            optimizer.update(layer, total)
        mx.eval(layer.parameters())
        return parameters_of(layer)

    ours, theirs = run(mw.BatchNorm(7)), run(nn.BatchNorm(7))
    for name in theirs:
        np.testing.assert_allclose(
            wide(ours[name]), wide(theirs[name]), rtol=1e-4, atol=1e-5, err_msg=name
        )
