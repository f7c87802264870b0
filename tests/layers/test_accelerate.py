"""accelerate() and restore() on trees of modules, and in training."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
import pytest
from tolerance import assert_same_bits, wide
from trees import parameters_of, trainable_of

pytestmark = pytest.mark.every_backend


class Special(nn.BatchNorm):
    """A subclass, which may do anything."""


class Net(nn.Module):
    """Norms in attributes, lists, dictionaries and both nested; one of them in two places."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.convolution = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm(6)
        self.listed: list[Any] = [
            nn.InstanceNorm(6, affine=True),
            {"deep": [nn.BatchNorm(6, 1e-3, 0.3)]},
        ]
        self.named = {"plain": nn.InstanceNorm(6), "special": Special(6), "ours": mw.BatchNorm(6)}
        self.tied = self.norm
        self.head = nn.Sequential(nn.ReLU(), nn.BatchNorm(6, affine=False), nn.LayerNorm(6))

    def __call__(self, x: mx.array) -> mx.array:
        x = self.tied(nn.relu(self.norm(self.convolution(x))))
        plain, deep = self.listed[0], self.listed[1]["deep"][0]
        x = deep(plain(x) + 1)
        for layer in self.named.values():
            x = layer(x) + x
        y: mx.array = self.head(x).mean((1, 2))
        return y


def named_modules(model: nn.Module) -> dict[str, Any]:
    return dict(model.named_modules())


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in named_modules(model).items()}


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in named_modules(model).items()}


def x(seed: int = 0) -> mx.array:
    return mx.random.normal((4, 8, 8, 3), key=mx.random.key(seed))


def randomised() -> Net:
    model = Net()
    rng = np.random.default_rng(3)
    for module in named_modules(model).values():
        for name, a in list(module.items()):
            if isinstance(a, mx.array):
                module[name] = mx.array(rng.uniform(0.2, 1.0, a.shape), mx.float32)
    return model


def test_which_layers_are_replaced() -> None:
    model = Net()
    before = kinds(model)
    assert mw.accelerate(model) is model
    after = kinds(model)
    changed: dict[type, type] = {nn.BatchNorm: mw.BatchNorm, nn.InstanceNorm: mw.InstanceNorm}
    assert after == {name: changed.get(cls, cls) for name, cls in before.items()}
    assert list(after.values()).count(mw.BatchNorm) == 5  # with the tied one and ours
    assert after["named.special"] is Special
    assert model.norm is model.tied


def test_parameters_are_the_same_arrays_under_the_same_names() -> None:
    model = randomised()
    before = parameters_of(model)
    trainable = list(trainable_of(model))
    mw.accelerate(model)
    after = parameters_of(model)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(trainable_of(model)) == trainable


@pytest.mark.since("0.32.1", "the running variance of mlx.nn was the biased one")
@pytest.mark.parametrize("training", [True, False])
def test_same_outputs_and_statistics(training: bool) -> None:
    theirs = randomised().train(training)
    ours = mw.accelerate(randomised().train(training))
    for seed in range(3):
        got, expected = ours(x(seed)), theirs(x(seed))
        np.testing.assert_allclose(wide(got), wide(expected), rtol=1e-4, atol=1e-5)
    for name, a in parameters_of(theirs).items():
        np.testing.assert_allclose(
            wide(parameters_of(ours)[name]), wide(a), rtol=1e-4, atol=1e-6, err_msg=name
        )


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = optim.AdamW(1e-3)
    goals = mx.random.normal((4, 6), key=mx.random.key(9))
    step = nn.value_and_grad(model, lambda x: ((model(x) - goals) ** 2).mean())
    losses = []
    for seed in range(steps):
        loss, grads = step(x(seed))
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    return losses


def test_training_gives_the_same_losses() -> None:
    expected = train(randomised(), 8)
    got = train(mw.accelerate(randomised()), 8)
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    assert got[0] != got[-1]


def test_frozen_names_and_modes() -> None:
    model = randomised()
    model.norm.freeze(keys="weight")
    model.head.freeze()
    model.listed[1]["deep"][0].eval()
    trainable = list(trainable_of(model))
    modes = modes_of(model)
    mw.accelerate(model)
    assert list(trainable_of(model)) == trainable
    assert modes_of(model) == modes
    mw.restore(model)
    assert list(trainable_of(model)) == trainable
    assert modes_of(model) == modes


def modules_of(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in named_modules(model).items()}


def test_a_second_call_changes_nothing() -> None:
    model = mw.accelerate(Net())
    before = modules_of(model)
    mw.accelerate(model)
    assert modules_of(model) == before


def test_restored_statistics_are_frozen_after_their_model_was_unfrozen() -> None:
    """mlx.nn's layers freeze them once, and again only in their own unfreeze()."""
    model = mw.accelerate(nn.Sequential(nn.BatchNorm(4)))
    model.unfreeze()
    assert sorted(trainable_of(mw.restore(model))) == ["layers.0.bias", "layers.0.weight"]


def test_restore_gives_the_same_objects_with_what_was_learnt_since() -> None:
    model = randomised()
    modules, text = modules_of(model), repr(model)
    mw.accelerate(model)
    train(model, 2)
    model.unfreeze()
    model.norm.momentum = 0.25
    model.eval()
    learnt = parameters_of(model)
    trainable = list(trainable_of(model))
    y = model(x())
    assert mw.restore(model) is model
    assert modules_of(model) == modules
    assert model.norm.momentum == 0.25
    model.norm.momentum = 0.1
    assert repr(model) == text
    assert list(parameters_of(model)) == list(learnt)
    assert all(parameters_of(model)[name] is learnt[name] for name in learnt)
    assert list(trainable_of(model)) == trainable
    np.testing.assert_allclose(wide(model(x())), wide(y), rtol=1e-4, atol=1e-5)
    mw.restore(model)
    assert modules_of(model) == modules


def test_weights_load_into_either(tmp_path: Any) -> None:
    path = str(tmp_path / "weights.safetensors")
    source = mw.accelerate(randomised())
    source.save_weights(path)
    target = Net()
    target.load_weights(path)
    for name, a in parameters_of(source).items():
        assert_same_bits(parameters_of(target)[name], a, name)


def test_print_shows_it() -> None:
    model = nn.Sequential(nn.BatchNorm(4), nn.InstanceNorm(4))
    assert repr(mw.accelerate(model)).splitlines() == [
        "Sequential(",
        "  (layers.0): BatchNorm(4, eps=1e-05, momentum=0.1, affine=True, "
        "track_running_stats=True, accelerated=True)",
        "  (layers.1): InstanceNorm(4, eps=1e-05, affine=False, accelerated=True)",
        ")",
    ]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm(4), nn.InstanceNorm(7))
    mw.accelerate(model)
    assert capsys.readouterr().out == ""
    mw.restore(model)
    model.layers[2].eps = 0.0
    mw.accelerate(model, verbose=True)
    assert capsys.readouterr().out.splitlines() == [
        "layer     was                     now",
        "layers.1  mlx.nn.BatchNorm(4)     mlx_welford.BatchNorm",
        "layers.2  mlx.nn.InstanceNorm(7)  "
        "as it was: [InstanceNorm] 'eps' must be positive but got 0.0.",
    ]
    assert type(model.layers[2]) is nn.InstanceNorm
    mw.accelerate(nn.Linear(2, 2), verbose=True)
    assert capsys.readouterr().out == "No layer to replace.\n"


def test_a_layer_by_itself() -> None:
    layer = nn.BatchNorm(4)
    new = mw.accelerate(layer)
    assert type(new) is mw.BatchNorm
    assert new.weight is layer.weight
    assert mw.restore(new) is layer


def test_restore_leaves_out_what_mlx_nn_does_not_have() -> None:
    layer = nn.BatchNorm(4)
    new = mw.accelerate(layer)
    new.momentum = None
    new.reset_running_stats()
    new(mx.random.normal((5, 4)))
    assert mw.restore(new) is layer
    assert sorted(parameters_of(layer)) == ["bias", "running_mean", "running_var", "weight"]
    assert layer.momentum == 0.1
    assert layer.running_mean is new.running_mean


def test_what_users_hang_on_a_layer_comes_along() -> None:
    layer = nn.BatchNorm(4)
    layer.note, layer.extra = "mine", mx.array([1.0])
    new = mw.accelerate(layer)
    assert new.note == "mine"
    assert new.extra is layer.extra


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_can_be_restored(clone: Any) -> None:
    model = mw.accelerate(randomised())
    twin = clone(model)
    assert repr(twin) == repr(model)
    assert_same_bits(twin(x()), clone(model)(x()))
    mw.restore(twin)
    assert type(twin.norm) is nn.BatchNorm
    assert twin.norm is twin.tied
    assert type(model.norm) is mw.BatchNorm


def test_half_precision_trains_where_mlx_nn_overflows() -> None:
    """float16 data with a mean of 3000, whose square float16 cannot hold."""
    data = mx.random.normal((64, 4)) + 300
    layer = nn.BatchNorm(4)
    layer.set_dtype(mx.float16)
    assert not mx.isfinite(layer(data.astype(mx.float16) * 10)).all().item()
    layer = nn.BatchNorm(4)
    layer.set_dtype(mx.float16)
    assert mx.isfinite(mw.accelerate(layer)(data.astype(mx.float16) * 10)).all().item()


def test_a_compiled_step_traced_afterwards() -> None:
    model = mw.accelerate(randomised())
    plain = mw.accelerate(randomised())

    @partial(mx.compile, inputs=[model.state], outputs=[model.state])
    def forward(x: mx.array) -> mx.array:
        y: mx.array = model(x)
        return y

    for seed in range(3):
        np.testing.assert_allclose(wide(forward(x(seed))), wide(plain(x(seed))), atol=1e-5)
    for name, a in parameters_of(plain).items():
        np.testing.assert_allclose(wide(parameters_of(model)[name]), wide(a), atol=1e-5)


# The layers are still those that the model's code knows


@pytest.mark.parametrize("kind", [nn.BatchNorm, nn.InstanceNorm])
@pytest.mark.parametrize("training", [True, False])
def test_instances_of_mlx_nn_which_can_compute_on_them(kind: Any, training: bool) -> None:
    """Projects ask isinstance(layer, nn.BatchNorm) and call nn.InstanceNorm.__call__(layer, x)."""
    layer, plain = kind(3, affine=True), kind(3, affine=True)
    attributes = sorted(vars(plain))
    for each in (layer, plain):
        each.weight, each.bias = mx.array([1.0, 2.0, 3.0]), mx.array([0.5, 0.0, -1.0])
        each.train(training)
    mw.accelerate(layer)
    assert isinstance(layer, kind)
    for ours in (layer, type(layer)(3, affine=True)):
        assert isinstance(ours, kind)
        assert set(attributes) <= set(vars(ours))
    assert_same_bits(kind.__call__(layer, x()), kind.__call__(plain, x()))
    for name, a in parameters_of(plain).items():
        assert_same_bits(parameters_of(layer)[name], a, name)


def test_freezing_by_isinstance_reaches_accelerated_layers() -> None:
    """The usual way to keep the statistics of a pretrained model."""
    model = mw.accelerate(randomised())
    before = {name: a for name, a in parameters_of(model).items() if "running" in name}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm):
            module.eval()
    model(x())
    for name, a in before.items():
        assert_same_bits(parameters_of(model)[name], a, name)


# Nothing that holds a layer goes stale


class Holder(nn.Module):
    """Calls its layer through something that got a reference to it before accelerate()."""

    def __init__(self, hold: Callable[[nn.Module], Callable[[mx.array], mx.array]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.norm = nn.BatchNorm(3)
        self.call = hold(self.norm)

    def __call__(self, x: mx.array) -> mx.array:
        return self.call(x)


HOLDING: dict[str, Callable[[nn.Module], Callable[[mx.array], mx.array]]] = {
    "checkpoint": nn.utils.checkpoint,
    "bound-method": lambda layer: layer.__call__,
    "closure": lambda layer: lambda x: layer(x) + 1,
    "second-tree": lambda layer: nn.Sequential(layer).__call__,
}


@pytest.mark.parametrize("name", HOLDING)
def test_whatever_holds_a_layer_goes_on_with_it(name: str) -> None:
    plain, fast = Holder(HOLDING[name]), mw.accelerate(Holder(HOLDING[name]))
    results = []
    for model in (plain, fast):
        step = nn.value_and_grad(model, lambda x, model=model: (model(x) ** 3).sum())
        _, grads = step(x())
        results.append((grads["norm"]["weight"], model.norm.running_mean, model.norm.running_var))
    for mine, base in zip(results[1], results[0], strict=True):
        assert (wide(base) != 0).all()
        np.testing.assert_allclose(wide(mine), wide(base), rtol=1e-3, atol=1e-4)


def test_an_optimizer_state_from_before_goes_on() -> None:
    losses = []
    for change in (lambda m: m, mw.accelerate):
        model, optimizer = randomised(), optim.Adam(1e-2)
        step = nn.value_and_grad(model, lambda x, model=model: (model(x) ** 2).mean())
        for seed in range(4):
            if seed == 2:
                change(model)
            loss, grads = step(x(seed))
            optimizer.update(model, grads)
            mx.eval(parameters_of(model), optimizer.state)
        losses.append(loss.item())
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_attributes_set_on_an_accelerated_layer_survive_restore() -> None:
    layer = mw.accelerate(nn.BatchNorm(4))
    layer.note, layer.extra, layer.eps = "mine", mx.array([1.0]), 1e-3
    mw.restore(layer)
    assert (layer.note, layer.extra.item(), layer.eps) == ("mine", 1.0, 1e-3)


def test_restore_leaves_nothing_behind() -> None:
    for kind in (nn.BatchNorm, nn.InstanceNorm):
        layer = kind(4)
        attributes, frozen = dict(vars(layer)), set(layer._no_grad)
        mw.restore(mw.convert_sync_batchnorm(mw.accelerate(layer)))
        assert type(layer) is kind
        assert vars(layer) == attributes
        assert layer._no_grad == frozen


def test_copies_hold_each_array_once() -> None:
    model = mw.accelerate(nn.Sequential(nn.BatchNorm(1000)))
    plain = nn.Sequential(nn.BatchNorm(1000))
    mx.eval(parameters_of(model), parameters_of(plain))
    assert len(pickle.dumps(model)) - len(pickle.dumps(plain)) < 1000  # an array has 4000 bytes


# Layers that are left as they were


def test_subclasses_and_the_reason_are_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(Special(4), nn.LayerNorm(4), mw.BatchNorm(4))
    mw.accelerate(model, verbose=True)
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["layer", "was", "now"],
        [
            "layers.0",
            "Special, a subclass of mlx.nn.BatchNorm",
            "as it was: a subclass may compute something else",
        ],
    ]


@pytest.mark.since("0.32.1", "the running variance of mlx.nn was the biased one")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("training", [True, False])
def test_pruned_layers_work(when: str, training: bool) -> None:
    """mlx.nn's layers take whatever fits their arrays and ignore num_features."""
    layer, plain = nn.BatchNorm(4).train(training), nn.BatchNorm(4).train(training)
    if when == "after":
        mw.accelerate(layer)
    for each in (layer, plain):
        for name in ("weight", "bias", "running_mean", "running_var"):
            each[name] = each[name][:3]
    mw.accelerate(layer)
    assert type(layer) is mw.BatchNorm
    np.testing.assert_allclose(wide(layer(x())), wide(plain(x())), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(wide(layer.running_var), wide(plain.running_var), rtol=1e-5)
    with pytest.raises(ValueError, match="'weight' must have shape"):
        layer(mx.random.normal((5, 4)))


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("weight", mx.ones((1, 3))),
        ("running_mean", mx.zeros((1,))),
        ("bias", mx.zeros((3,), mx.int32)),
    ],
)
def test_arrays_that_these_layers_refuse(
    name: str, array: mx.array, capsys: pytest.CaptureFixture[str]
) -> None:
    """mlx.nn broadcasts them and goes on doing so."""
    layer = nn.BatchNorm(3).eval()
    layer[name] = array
    expected = layer(x())
    mw.accelerate(layer, verbose=True)
    assert "as it was: [BatchNorm] '" in capsys.readouterr().out
    assert type(layer) is nn.BatchNorm
    assert_same_bits(layer(x()), expected)
