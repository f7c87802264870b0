"""accelerate(fuse=True) and fuse_block: the same results from fewer passes, and the way back."""

import copy
import pickle
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
import pytest
from graphs import nodes
from mlx_welford._input_bias import BiasedArray
from tolerance import assert_same_bits, bits, wide
from trees import leaves, parameters_of, trainable_of

pytestmark = pytest.mark.every_backend

CLONES = pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)


def x(*shape: int) -> mx.array:
    return mx.random.normal(shape or (4, 8, 8, 3), key=mx.random.key(len(shape)))


def randomised(model: Any) -> Any:
    """With parameters that follow from their names and shapes, none at its first value."""
    for module in model.modules():
        for name, a in list(module.items()):
            if isinstance(a, mx.array):
                rng = np.random.default_rng(zlib.crc32(f"{name}{a.shape}".encode()))
                module[name] = mx.array(rng.uniform(0.2, 1.0, a.shape), mx.float32)
    return model


def network() -> Any:
    """An activation behind each normalisation, a convolution with a bias before some."""
    inner = nn.Sequential(nn.Conv2d(6, 6, 3), nn.InstanceNorm(6, affine=True))
    layers = [
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm(6),
        nn.ReLU(),
        inner,
        nn.LeakyReLU(0.2),
        nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.GroupNorm(2, 6)),
        nn.silu,
        nn.ConvTranspose2d(6, 6, 2),
        nn.BatchNorm(6, affine=False),
        partial(nn.leaky_relu, negative_slope=0.3),
    ]
    return randomised(nn.Sequential(*layers))


def step(model: nn.Module, *inputs: mx.array) -> dict[str, mx.array]:
    """Output, running statistics afterwards, and all gradients."""
    cotangent: list[mx.array] = []

    def loss(parameters: Any, *inputs: mx.array) -> tuple[mx.array, mx.array]:
        model.update(parameters)
        z = model(*inputs)
        cotangent[:] = [mx.random.normal(z.shape, key=mx.random.key(5))]
        return (z * cotangent[0]).sum(), z

    given = model.trainable_parameters()
    (_, z), (of_parameters, of_x) = mx.value_and_grad(loss, (0, 1))(given, *inputs)
    model.update(given)
    found = {"z": z, "grad of x": of_x}
    found |= {f"grad of {name}": a for name, a in leaves(of_parameters).items()}
    return found | {n: a for n, a in parameters_of(model).items() if "running" in n}


def assert_close(got: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert got.keys() == expected.keys()
    for name, a in got.items():
        want = wide(expected[name])
        size = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(wide(a), want, rtol=1e-3, atol=1e-4 * size, err_msg=name)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def everything(model: nn.Module) -> dict[str, Any]:
    """All attributes of all modules, but the names of what is frozen, which is a set."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = module
        found |= {f"{path}.{name}": value for name, value in vars(module).items()}
        found |= {f"{path}[{name}]": value for name, value in module.items()}
    return {
        name: frozenset(v) if isinstance(v, set) else list(v) if isinstance(v, list) else v
        for name, v in found.items()
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """The same objects under the same names, in the same order."""

    def equal(v: Any, w: Any) -> bool:
        if isinstance(v, list):
            return len(v) == len(w) and all(map(equal, v, w))
        return v is w or (not isinstance(v, mx.array | nn.Module) and v == w)

    return list(a) == list(b) and all(equal(a[name], b[name]) for name in a)


# ---- The same results ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_statistics_are_those_of_before(training: bool) -> None:
    plain = mw.accelerate(network().train(training))
    fused = mw.accelerate(network().train(training), fuse=True)
    activations = {n: m.activation for n, m in fused.named_modules() if hasattr(m, "activation")}
    assert activations == {
        "layers.1": "relu",
        "layers.3.layers.1": "leaky_relu",
        "layers.5.layers.1": "silu",
        "layers.8": "leaky_relu",
    }
    for index in (2, 4, 6, 9):
        assert isinstance(fused.layers[index], nn.Identity)
    assert_close(step(fused, x()), step(plain, x()))


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(3, 6, 3), (4, 8, 3)),
    "Conv2d": (lambda: nn.Conv2d(3, 6, 3, padding=1), (4, 8, 8, 3)),
    "Conv3d": (lambda: nn.Conv3d(3, 6, 2), (2, 4, 4, 4, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 6, 3), (4, 8, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 6, 3), (4, 6, 6, 3)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(3, 6, 2), (2, 3, 3, 3, 3)),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: mw.BatchNorm(6),  # that of mlx.nn takes no five dimensions
    "instance": lambda: nn.InstanceNorm(6, affine=True),
    "tracking": lambda: mw.InstanceNorm(6, track_running_stats=True),
    "sync": lambda: mw.SyncBatchNorm(6),
    "no statistics": lambda: mw.BatchNorm(6, track_running_stats=False),
    "open": lambda: mw.BatchNorm(),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.pairwise(("backend", "training", "norm"), ("backend", "training", "convolution"))
def test_a_bias_of_a_convolution(convolution: str, training: bool, norm: str) -> None:
    make, shape = CONVOLUTIONS[convolution]

    def model() -> Any:
        layers = nn.Sequential(make(), NORMS[norm]())
        layers(x(*shape))  # which sets the number of channels
        return randomised(layers).train(training)

    plain, fused = mw.accelerate(model()), mw.accelerate(model(), fuse=True)
    assert isinstance(fused.layers[0](x(*shape)), BiasedArray)
    expected, got = step(plain, x(*shape)), step(fused, x(*shape))
    of_bias = "grad of layers.0.bias"
    if training or norm in ("instance", "no statistics"):  # where a constant changes nothing
        assert (wide(got[of_bias]) == 0).all()
        expected[of_bias] = mx.zeros((6,))  # but for rounding
    else:
        assert (wide(got[of_bias]) != 0).all()
    assert_close(got, expected)


@pytest.mark.kernels("their nodes in MLX's graph")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_nobody_adds_the_bias(norm: str, training: bool) -> None:
    def model() -> Any:
        layers = nn.Sequential(nn.Conv2d(3, 6, 3), NORMS[norm]()).train(training)
        layers(x())
        mx.eval(layers.parameters())
        return layers

    given = x()
    mx.eval(given)
    plain, fused = mw.accelerate(model()), mw.accelerate(model(), fuse=True)
    assert nodes(plain(given)).count("Add") == 1
    assert nodes(fused(given)).count("Add") == 0


def test_two_steps_of_training_are_those_of_before() -> None:
    models = [mw.accelerate(network()), mw.accelerate(network(), fuse=True)]
    for model in models:
        optimizer = optim.AdamW(1e-3)
        loss = nn.value_and_grad(model, lambda x, model=model: (model(x) ** 2).mean())
        for _ in range(2):
            _, gradients = loss(x())
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
    # Adam makes a step of a gradient that should be 0 and was rounded.
    got, expected = (
        {n: a for n, a in parameters_of(m).items() if "bias" not in n or n.startswith("layers.7")}
        for m in models
    )
    assert_close(got, expected | {n: a for n, a in got.items() if n == "layers.7.bias"})


def test_a_compiled_step() -> None:
    model, plain = mw.accelerate(network(), fuse=True), mw.accelerate(network(), fuse=True)

    @partial(mx.compile, inputs=[model.state], outputs=[model.state])
    def forward(x: mx.array) -> mx.array:
        z: mx.array = model(x)
        return z

    for _ in range(2):
        np.testing.assert_allclose(wide(forward(x())), wide(plain(x())), rtol=1e-4, atol=1e-4)
    assert_close(parameters_of(model), parameters_of(plain))


@pytest.mark.parametrize("training", [True, False])
def test_half_precision(training: bool) -> None:
    fused = mw.accelerate(network().train(training), fuse=True)
    plain = mw.accelerate(network().train(training))
    fused.set_dtype(mx.float16)
    z = fused(x().astype(mx.float16))
    assert z.dtype == mx.float16
    # A bias in float32 after a convolution in float16 makes float32 of both: it is not handed over.
    layers = mw.accelerate(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm(6)), fuse=True)
    layers.layers[0].weight = layers.layers[0].weight.astype(mx.float16)
    assert layers(x().astype(mx.float16)).dtype == mx.float32
    expected = wide(plain(x()))
    np.testing.assert_allclose(wide(z), expected, atol=0.05 * float(np.abs(expected).max()))


# ---- Which activations ---------------------------------------------------------------------------

ACTIVATIONS: list[tuple[Any, str | None, float]] = [
    (nn.ReLU(), "relu", 0.01),
    (nn.ReLU6(), "relu6", 0.01),
    (nn.LeakyReLU(), "leaky_relu", 0.01),
    (nn.LeakyReLU(-0.5), "leaky_relu", -0.5),
    (nn.SiLU(), "silu", 0.01),
    (nn.GELU(), "gelu", 0.01),
    (nn.GELU("tanh"), "gelu_approx", 0.01),
    (nn.GELU("precise"), "gelu_approx", 0.01),
    (nn.GELU("fast"), None, 0.01),
    (nn.Hardswish(), "hardswish", 0.01),
    (nn.Mish(), None, 0.01),
    (nn.relu, "relu", 0.01),
    (nn.gelu_approx, "gelu_approx", 0.01),
    (nn.gelu_fast_approx, None, 0.01),
    (nn.leaky_relu, "leaky_relu", 0.01),
    (partial(nn.leaky_relu, negative_slope=0.1), "leaky_relu", 0.1),
    (partial(nn.leaky_relu, negative_slope=mx.array(0.1)), None, 0.01),
    (partial(nn.elu, alpha=0.1), None, 0.01),
    (lambda x: nn.relu(x), None, 0.01),
]


class OwnReLU(nn.ReLU):
    """A subclass, which may compute anything."""


@pytest.mark.parametrize(
    ("activation", "name", "slope"),
    [*ACTIVATIONS, (OwnReLU(), None, 0.01)],  # type: ignore[no-untyped-call]
    ids=[*map(str, range(len(ACTIVATIONS))), "subclass"],
)
def test_activations_that_a_layer_computes(activation: Any, name: str | None, slope: float) -> None:
    model: Any = nn.Sequential(nn.BatchNorm(3), activation)
    expected = mw.accelerate(model)(x())
    mw.accelerate(model, fuse=True)
    assert (model.layers[0].activation, model.layers[0].negative_slope) == (name, slope)
    assert isinstance(model.layers[1], nn.Identity) == (name is not None)
    np.testing.assert_allclose(wide(model(x())), wide(expected), rtol=1e-4, atol=2e-5)


# ---- What is left as it was ----------------------------------------------------------------------


class Own(nn.Sequential):
    """An nn.Sequential that calls its layers as all do."""


class Twice(nn.Sequential):
    def __call__(self, x: mx.array) -> mx.array:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


def test_subclasses_that_call_their_layers_in_another_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = nn.Sequential(*(kind(nn.BatchNorm(3), nn.ReLU()) for kind in (Own, Twice)))
    mw.accelerate(model, fuse=True, verbose=True)
    assert [type(layer.layers[1]).__name__ for layer in model.layers] == ["Identity", "ReLU"]
    assert "as it was: its __call__ may do something else" in capsys.readouterr().out


def test_a_layer_in_several_places(capsys: pytest.CaptureFixture[str]) -> None:
    norm, convolution, block = (
        nn.BatchNorm(3),
        nn.Conv2d(3, 3, 1),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm(3)),
    )
    shared = nn.ReLU()
    model: Any = nn.Sequential(
        norm, nn.ReLU(), convolution, nn.InstanceNorm(3), shared, block, nn.ReLU(), block
    )
    model.also = {"here": [norm, convolution]}
    randomised(model)
    expected = mw.accelerate(model)(x())
    mw.accelerate(model, fuse=True, verbose=True)
    assert [type(model.layers[i]).__name__ for i in (1, 4, 6)] == ["ReLU", "Identity", "ReLU"]
    assert type(convolution) is nn.Conv2d
    # Within the block everything is as in one place.
    assert type(block.layers[0]) is not nn.Conv2d
    text = capsys.readouterr().out
    assert text.count("as it was: layers.0 is in several places") == 1
    assert text.count("as it was: layers.2 is in several places") == 1
    assert_close({"z": model(x())}, {"z": expected})


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.BatchNorm(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.GroupNorm(2, 6),
        nn.Mish(),
        mw.BatchNorm(6, activation="relu"),
        nn.silu,
    )
    mw.accelerate(model, fuse=True, verbose=True)
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["layer", "was", "now"],
        ["layers.1", "mlx.nn.BatchNorm(6)", "mlx_welford.BatchNorm"],
        ["layers.4", "mlx.nn.GroupNorm(2, 6)", "mlx_welford.GroupNorm"],
        ["layers.0", "mlx.nn.Conv2d", "hands its bias to layers.1"],
        ["layers.2", "mlx.nn.ReLU", "computed by layers.1"],
        ["layers.3", "mlx.nn.Conv2d", "as it was: its bias does not cancel in layers.4"],
        ["layers.5", "mlx.nn.Mish", "as it was: no layer computes it"],
        ["layers.7", "mlx.nn.silu", "as it was: layers.6 has an activation"],
    ]


def test_without_fuse_nothing_is_fused() -> None:
    model = mw.accelerate(network())
    assert type(model.layers[0]) is nn.Conv2d
    assert type(model.layers[2]) is nn.ReLU
    assert model.layers[1].activation is None


def test_a_second_call_changes_nothing() -> None:
    model = mw.accelerate(network(), fuse=True)
    before = everything(model)
    mw.accelerate(model, fuse=True)
    assert same(everything(model), before)


# ---- A bias goes with the array, not with the layers ---------------------------------------------


def pair() -> Any:
    """A convolution and the evaluation of a normalisation, whose result depends on the bias."""
    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm(6))).eval()
    return mw.accelerate(model, fuse=True)


def test_a_convolution_that_is_replaced() -> None:
    model, other = pair(), randomised(nn.Conv2d(3, 6, 3))
    model.layers[0] = other
    assert_same_bits(model(x()), model.layers[1](other(x())))
    other = nn.Conv2d(3, 6, 3, bias=False)
    model.layers[0] = other
    assert_same_bits(model(x()), model.layers[1](other(x())))


@CLONES
def test_either_layer_copied_alone(clone: Any) -> None:
    model = pair()
    expected = mw.restore(clone(model))(x())
    plain = randomised(nn.Conv2d(3, 6, 3))
    convolution, norm = clone(model.layers[0]), clone(model.layers[1])
    assert_same_bits(convolution(x()), plain(x()))
    for z in (
        norm(plain(x())),
        norm(convolution(x())),
        norm(model.layers[0](x())),
        model.layers[1](convolution(x())),
    ):
        np.testing.assert_allclose(wide(z), wide(expected), rtol=1e-5, atol=1e-5)


def test_a_convolution_called_alone_adds_its_bias() -> None:
    convolution, plain = pair().layers[0], randomised(nn.Conv2d(3, 6, 3))
    y, expected = convolution(x()), plain(x())
    assert_same_bits(y, expected)
    assert_same_bits(y * 2 + y, expected * 2 + expected)
    assert bits(y[0]).shape == bits(expected[0]).shape
    assert_same_bits(copy.deepcopy(y), expected)
    assert_same_bits(pickle.loads(pickle.dumps(y)), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.__iadd__(1),
        lambda y: y.__isub__(1),
        lambda y: y.__imul__(2),
        lambda y: y.__itruediv__(2),
        lambda y: y.__ipow__(2),
        lambda y: y.__setitem__(0, 7.0),
    ],
)
def test_an_output_that_is_changed_in_place(change: Callable[[mx.array], Any]) -> None:
    model = pair()
    y, plain = model.layers[0](x()), mx.array(model.layers[0](x()))
    change(y)
    change(plain)
    assert_same_bits(model.layers[1](y), model.layers[1](plain))


@pytest.mark.parametrize("axis", [1, 2])
def test_channels_elsewhere_take_no_bias(axis: int) -> None:
    model = pair()
    norm = mw.BatchNorm(6, axis=axis)
    assert_same_bits(norm(model.layers[0](x())), norm(randomised(nn.Conv2d(3, 6, 3))(x())))


def test_a_bias_for_another_number_of_channels() -> None:
    model = pair()
    with pytest.raises(ValueError, match="expected 4 channels"):
        mw.BatchNorm(4).eval()(model.layers[0](x()))


def test_a_bias_that_is_set_later_or_deleted() -> None:
    model = pair()
    model.layers[0].bias = mx.arange(6.0)
    plain = randomised(nn.Conv2d(3, 6, 3))
    plain.bias = mx.arange(6.0)
    expected = model.layers[1](plain(x()))
    np.testing.assert_allclose(wide(model(x())), wide(expected), rtol=1e-5, atol=1e-5)
    del model.layers[0]["bias"], plain["bias"]
    assert_same_bits(model(x()), model.layers[1](plain(x())))


# ---- The way back, and copies --------------------------------------------------------------------


def test_names_and_weights_are_the_same_both_ways(tmp_path: Any) -> None:
    path = str(tmp_path / "weights.safetensors")
    plain, fused = network(), mw.accelerate(network(), fuse=True)
    assert list(parameters_of(plain)) == list(parameters_of(fused))
    assert list(trainable_of(plain)) == list(trainable_of(fused))
    for source, target in ((plain, fused), (fused, plain)):
        source.layers[0].bias = source.layers[0].bias + 1
        source.save_weights(path)
        target.load_weights(path)
        for name, a in parameters_of(source).items():
            assert_same_bits(parameters_of(target)[name], a, name)


@pytest.mark.parametrize("native", [True, False])
def test_restore_undoes_all_of_it(native: bool) -> None:
    """Also for layers that were this package's before."""
    model = mw.accelerate(network()) if native else network()
    model.layers[2].eval()
    if native:
        for _, module in model.named_modules():
            vars(module).pop("_accelerated", None)
    before = everything(model)
    mw.accelerate(model, fuse=True)
    mw.restore(model)
    assert same(everything(model), before)


def test_restore_keeps_what_was_learnt_since_and_the_mode() -> None:
    model = mw.accelerate(network(), fuse=True)
    optimizer = optim.SGD(1e-2)
    loss = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())
    optimizer.update(model, loss(x())[1])
    model.eval()
    learnt, z = parameters_of(model), model(x())
    mw.restore(model)
    assert kinds(model) == kinds(network())
    assert not any(module.training for module in model.modules())
    assert all(parameters_of(model)[name] is a for name, a in learnt.items())
    assert_close({"z": model(x())}, {"z": z})


def copyable() -> Any:
    """Without functions of mlx.nn, which cannot be copied."""
    model = network()
    model.layers[6], model.layers[9] = nn.SiLU(), nn.LeakyReLU(0.3)
    return model


@CLONES
def test_copies_of_a_fused_model(clone: Any) -> None:
    model = mw.accelerate(copyable(), fuse=True)
    twin = clone(model)
    assert repr(twin) == repr(model)
    assert_same_bits(twin(x()), model(x()))
    mw.restore(twin)
    assert kinds(twin) == kinds(copyable())
    assert model.layers[1].activation == "relu"
    twin, plain = twin.eval(), model.eval()
    assert_close({"z": twin(x())}, {"z": plain(x())})


def test_an_activation_comes_back_where_its_normalisation_gives_it_up() -> None:
    model: Any = mw.accelerate(nn.Sequential(nn.BatchNorm(3), nn.ReLU()), fuse=True)
    expected = model(x())
    mw.restore(model.layers[0])
    assert type(model.layers[0]) is nn.BatchNorm
    assert_close({"z": model(x())}, {"z": expected})
    model = mw.accelerate(nn.Sequential(mw.BatchNorm(3), nn.ReLU()), fuse=True)
    model.layers[0].activation = None
    assert_close({"z": model(x())}, {"z": expected})
    assert (wide(model(x())) >= 0).all()


def test_synchronised_layers_keep_the_activation() -> None:
    model: Any = mw.accelerate(nn.Sequential(nn.BatchNorm(3), nn.ReLU()), fuse=True)
    expected = model(x())
    mw.convert_sync_batchnorm(model)
    assert_close({"z": model(x())}, {"z": expected})
    mw.restore(model)
    assert kinds(model)["layers.1"] is nn.ReLU


# ---- Blocks --------------------------------------------------------------------------------------


class Block(nn.Module):
    """act(bn(conv(x)))"""

    def __init__(self, activation: Any = None, norm: Any = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conv = nn.Conv2d(3, 3, 3)
        self.bn: Any = nn.BatchNorm(3) if norm is None else norm
        self.act: Any = nn.SiLU() if activation is None else activation

    def __call__(self, x: mx.array) -> mx.array:
        z: mx.array = self.act(self.bn(self.conv(x)))
        return z


class Optional(Block):
    """Asks whether there is an activation before it calls it."""

    def __call__(self, x: mx.array) -> mx.array:
        x = self.bn(self.conv(x))
        if self.act is not None:
            x = self.act(x)
        return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "activation", [None, nn.relu, nn.LeakyReLU(0.1)], ids=["silu", "relu", "leaky"]
)
@pytest.mark.parametrize("kind", [Block, Optional])
def test_a_block(kind: Any, activation: Any, training: bool) -> None:
    plain: Any = randomised(kind(activation)).train(training)
    fused: Any = randomised(kind(activation)).train(training)
    before = everything(fused)
    same_block: Any = mw.fuse_block(fused)
    assert same_block is fused
    assert type(fused.bn) is mw.BatchNorm
    assert isinstance(fused.act, nn.Identity)
    assert isinstance(fused.conv(x()), BiasedArray)
    got, expected = step(fused, x()), step(plain, x())
    if training:
        expected["grad of conv.bias"] = mx.zeros((3,))
    assert_close(got, expected)
    for name, a in parameters_of(mw.restore(fused)).items():
        if "running" in name:
            before[f"bn[{name.split('.')[1]}]"] = a
    assert same(
        {n: v for n, v in everything(fused).items() if n != ".act"},
        {n: v for n, v in before.items() if n != ".act"},
    )
    assert fused.act is before.get(".act", before.get("[act]"))


class Residual(nn.Module):
    """leaky_relu(bn(conv(x)) + x), with the activation in the code"""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn: Any = nn.BatchNorm(3)

    def __call__(self, x: mx.array) -> mx.array:
        z: mx.array = nn.leaky_relu(self.bn(self.conv(x)) + x)
        return z


@pytest.mark.since("0.32.1", "the running variance of mlx.nn was the biased one")
@pytest.mark.parametrize("training", [True, False])
def test_a_block_without_an_activation_hands_over_its_bias(training: bool) -> None:
    plain, fused = (randomised(Residual()).train(training) for _ in range(2))
    before = everything(fused)
    same_block: Any = mw.fuse_block(fused, activation=None)
    assert same_block is fused
    assert isinstance(fused.conv(x()), BiasedArray)
    assert fused.bn.activation is None
    got, expected = step(fused, x()), step(plain, x())
    if training:
        expected["grad of conv.bias"] = mx.zeros((3,))
    assert_close(got, expected)
    if not training:
        assert same(everything(mw.restore(fused)), before)


def test_blocks_with_nothing_to_fuse() -> None:
    class Mish(Block):
        def __init__(self) -> None:
            super().__init__(nn.Mish())
            del self["conv"]

    for block in (Mish(), Block(norm=nn.LayerNorm(3))):
        before = everything(block)
        assert mw.fuse_block(block) is None
        assert same(everything(block), before)
    block = Block(norm=nn.GroupNorm(1, 3))
    same_block: Any = mw.fuse_block(block)
    assert same_block is block
    assert type(block.conv) is nn.Conv2d
    assert mw.fuse_block(block) is None


def test_blocks_that_cannot_be_fused() -> None:
    class Twice(Block):
        def __call__(self, x: mx.array) -> mx.array:
            z: mx.array = self.act(self.act(self.bn(x)))
            return z

    with pytest.raises(ValueError, match=r"\[fuse_block\] Block has no attribute 'norm'."):
        mw.fuse_block(Block(), norm="norm")
    with pytest.raises(ValueError, match=r"\[fuse_block\] Twice calls 'act' in several places."):
        mw.fuse_block(Twice())
    block: Any = Block()
    block.other = block.bn
    with pytest.raises(ValueError, match=r"\[fuse_block\] 'bn' and 'other' of Block are one lay"):
        mw.fuse_block(block)


class Net(nn.Module):
    """Blocks in a list, one of them in two places, and a norm whose activation is in the code."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.blocks: list[Any] = [Block(), Block(nn.relu), Optional()]
        self.tied = self.blocks[0]
        self.last = Block(nn.Mish())
        self.scale = mx.ones((3,))

    def __call__(self, x: mx.array) -> mx.array:
        for block in (*self.blocks, self.tied, self.last):
            x = mx.pad(block(x), [(0, 0), (1, 1), (1, 1), (0, 0)]) * self.scale
        return x


def test_blocks_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    plain, model = mw.accelerate(randomised(Net())), randomised(Net())
    before = everything(model)
    assert mw.accelerate(model, also={Block: mw.fuse_block}, verbose=True) is model
    assert [block.bn.activation for block in model.blocks] == ["silu", "relu", None]
    assert model.last.bn.activation is None
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(row for row in rows if "Block" in row) == [
        ["blocks.0", "Block", "edited"],
        ["blocks.1", "Block", "edited"],
        ["last", "Block", "edited"],
    ]
    assert_close({"z": model(x())}, {"z": plain(x())})
    model.scale = trained = model.scale * 2
    mw.accelerate(model, also={Block: mw.fuse_block})
    mw.restore(model)
    after = everything(model)
    statistics = {name for name in before if "running" in name}
    for changed in (before, after):
        for name in ("[scale]", *statistics):
            del changed[name]
    assert same(after, before)
    assert model.scale is trained


class Other(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inner = nn.Sequential(block.conv, block.bn, block.act)

    def __call__(self, x: mx.array) -> mx.array:
        z: mx.array = self.inner(x)
        return z


@CLONES
def test_blocks_that_are_replaced(clone: Any) -> None:
    model, plain = randomised(Net()), mw.accelerate(randomised(Net()))
    model.blocks[1].act = plain.blocks[1].act = nn.ReLU()
    blocks = list(model.blocks)
    given = mw.accelerate(model, fuse=True, also={Block: Other})
    assert [type(block) for block in model.blocks] == [Other, Other, Optional]
    assert model.tied is model.blocks[0]
    assert isinstance(model.tied.inner.layers[2], nn.Identity)
    assert given is model
    twin = clone(model)
    assert_close({"z": model.eval()(x())}, {"z": plain.eval()(x())})
    for each in (model, twin):
        mw.restore(each)
        assert [type(block) for block in each.blocks] == [Block, Block, Optional]
        assert each.tied is each.blocks[0]
        assert type(each.tied.bn) is nn.BatchNorm
        assert type(each.tied.act) is nn.SiLU
        assert type(each.tied.conv) is nn.Conv2d
    assert list(map(id, model.blocks)) == list(map(id, blocks))
    assert not any(block.training for block in model.modules())


def test_what_replaces_a_block_has_its_mode() -> None:
    model, plain = randomised(Net()).eval(), mw.accelerate(randomised(Net())).eval()
    mw.accelerate(model, also={Block: Other})
    assert not any(module.training for module in model.modules())
    assert_close({"z": model(x())}, {"z": plain(x())})
    assert not any(module.training for module in mw.restore(model).modules())


def test_what_replaces_a_block_in_training_keeps_frozen_layers() -> None:
    model = randomised(Net())
    model.blocks[0].bn.eval()
    before = everything(model)
    mw.accelerate(model, also={Block: Other})
    assert not model.blocks[0].inner.layers[1].training
    assert same(everything(mw.restore(model)), before)


def test_a_model_that_is_a_block_itself() -> None:
    block = Block()
    assert mw.accelerate(block, also={Block: mw.fuse_block}) is block
    assert mw.restore(block) is block
    other = mw.accelerate(block, also={Block: Other})
    assert type(other) is Other
    assert mw.restore(other) is block


@CLONES
def test_restore_brings_back_whatever_was_changed(clone: Any) -> None:
    class Fused(Block):
        pass

    globals()["Fused"] = Fused  # so that it can be pickled
    setattr(Fused, "__qualname__", "Fused")  # noqa: B010

    def edit(block: Any) -> Any:
        block.__class__ = Fused
        block.added = nn.Linear(2, 2)
        vars(block)["number"] = 7  # not an item of the module
        block.conv.weight = block.conv.weight * 2
        block.conv.stride = (2, 2)
        del block["act"], block.note
        block.list.append(nn.ReLU())
        block.dictionary["a"] = block.dictionary.pop("b")
        block.bn.freeze()
        return block

    model: Any = nn.Sequential(Block(), nn.Sequential(Block()))
    for block in (model.layers[0], model.layers[1].layers[0]):
        block.note, block.list, block.dictionary = "mine", [nn.ReLU()], {"b": nn.ReLU(), "c": [1]}
    text, before = repr(model), everything(model)
    dictionaries = [dict(model.layers[0].dictionary)]
    mw.accelerate(model, also={Block: edit})
    assert type(model.layers[1].layers[0]) is Fused
    assert "added" in repr(model)
    mw.accelerate(model, also={Block: edit, Fused: edit})
    twin = mw.restore(clone(model))
    assert repr(twin) == text
    assert "weight" not in twin.layers[0].bn._no_grad
    assert twin.layers[0].note == "mine"
    mw.restore(model)
    assert same(everything(model), before)
    assert dictionaries == [model.layers[0].dictionary]


def test_what_make_may_return() -> None:
    model = nn.Sequential(Block())
    assert mw.accelerate(model, also={Block: lambda block: None}) is model
    assert type(model.layers[0]) is Block
    with pytest.raises(TypeError, match="'also' must give a Module or None for Block but gave int"):
        mw.accelerate(model, also={Block: lambda block: 3})  # type: ignore[dict-item, return-value]
