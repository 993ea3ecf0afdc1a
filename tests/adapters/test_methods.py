"""Adapters on a model: the layer's maths against plain torch and PEFT, merging, and what is trainable."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.adapters import methods
from fedtune.adapters.describe import describe
from fedtune.adapters.layers.fed_sb import SBLinear
from fedtune.adapters.layers.lora import LoRALinear
from fedtune.adapters.spec import target_linears
from fedtune.errors import ModelError, ShapeMismatch
from fedtune.job import AdapterSection
from fedtune.models.base import layout
from fedtune.workflows.setup import data_free_frame, open_setup

BATCH = {
    "input_ids": torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}


@pytest.fixture
def opened(tiny_job):
    def open_(*changes):
        setup = open_setup(tiny_job(*changes))
        model = setup.fresh_model()
        return setup, model, data_free_frame(setup, model)

    return open_


def drawn(spec, seed=0):
    rng = np.random.default_rng(seed)
    return {t.name: (0.1 * rng.standard_normal(t.shape)).astype(np.float32) for t in spec.trainable}


def test_fed_sb_layer_is_its_formula():
    rng = np.random.default_rng(0)
    base = nn.Linear(6, 5)
    a, b, r = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 6), (5, 3), (3, 3)))
    layer = SBLinear(base.requires_grad_(False), a, b, scale=0.5)
    with torch.no_grad():
        layer.core.weight.copy_(torch.from_numpy(r))
    x, g = torch.randn(4, 6), torch.randn(4, 5)
    w = base.weight + 0.5 * torch.from_numpy(b @ r @ a)
    y = layer(x)
    torch.testing.assert_close(y, x @ w.T + base.bias)
    y.backward(g)
    dw = g.T @ x  # gradient of the merged weight; the core's is s·Bᵀ(dW)Aᵀ (Fed-SB, section 3)
    torch.testing.assert_close(
        layer.core.weight.grad, 0.5 * torch.from_numpy(b).T @ dw @ torch.from_numpy(a).T
    )
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["core.weight"]


def test_lora_layer_is_pefts():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5))
    theirs = get_peft_model(copy.deepcopy(net), LoraConfig(r=2, lora_alpha=8, target_modules=["0"]))
    ours = LoRALinear(net[0], 2, scale=8 / 2)
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    with torch.no_grad():
        ours.down.weight.copy_(a)
        ours.up.weight.copy_(b)
        layer = theirs.base_model.model[0]
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "changes",
    [
        ("adapter.method=fed-sb",),
        ("adapter.method=fed-sb", "adapter.alpha=8.0", "adapter.init=random"),
        ("adapter.method=lora", "adapter.alpha=8.0"),
        ("adapter.method=ffa-lora", "adapter.alpha=8.0"),
        ("adapter.method=bias",),
        ("adapter.method=full",),
        ("adapter.method=head",),
    ],
)
def test_merged_equals_adapted(opened, changes):
    setup, model, frame = opened(*changes)
    arrays = drawn(setup.spec)
    methods.write(methods.attach(model, setup.spec, frame), arrays)
    merged = setup.fresh_model()
    plain = merged(**BATCH)
    methods.merge(merged, setup.spec, frame, arrays)
    torch.testing.assert_close(merged(**BATCH), model(**BATCH), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, merged(**BATCH), atol=1e-3)


@pytest.mark.parametrize("method", ["fed-sb", "lora", "ffa-lora", "bias", "full", "head"])
def test_round_0_is_the_base_and_only_the_adapter_trains(opened, method):
    setup, model, frame = opened(f"adapter.method={method}")
    plain = model(**BATCH)
    arrays = methods.initial(model, setup.spec, {}, 0)
    parameters = methods.attach(model, setup.spec, frame)
    methods.write(parameters, arrays)
    torch.testing.assert_close(model(**BATCH), plain)
    assert list(parameters) == [t.name for t in setup.spec.trainable]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == setup.spec.size
    assert all(np.array_equal(value, arrays[name]) for name, value in methods.read(parameters).items())


def test_a_core_has_rank_squared_numbers(opened):
    setup, _, _ = opened("adapter.rank=4", "adapter.train-head=false")
    # 6 linears in each of 2 BERT blocks
    assert len(setup.spec.linears) == 2 * 6 and setup.spec.size == 12 * 4**2


def test_a_frame_of_another_shape_is_refused(opened):
    setup, model, frame = opened()
    name = next(iter(frame))
    with pytest.raises(ShapeMismatch, match=name):
        methods.attach(model, setup.spec, frame | {name: frame[name][:2]})
    with pytest.raises(ShapeMismatch, match="missing"):
        methods.attach(setup.fresh_model(), setup.spec, {})


def test_targets_are_whole_names_inside_a_block(opened):
    found = layout(opened()[1])
    # and not attention.output.dense
    assert {x.short for x in target_linears(found, ["output.dense"])} == {"output.dense"}
    assert {x.short for x in target_linears(found, ["attention.self.*"])} == {
        f"attention.self.{n}" for n in ("query", "key", "value")
    }
    with pytest.raises(
        ModelError,
        match=r"adapter.targets: 'q_proj' names no linear of this base; it has attention\.output\.dense, ",
    ):
        target_linears(found, ["q_proj"])


def test_a_rank_above_the_smaller_side_is_refused(opened):
    found = layout(opened()[1])
    with pytest.raises(ModelError, match=r"adapter.rank = 33: at most 32"):
        describe(found, AdapterSection(rank=33))
    assert describe(found, AdapterSection(rank=32)).rank == 32


def test_conv1d_blocks_have_no_linear(tiny_job, tiny_gpt2):
    setup = open_setup(tiny_job(f"model.source={tiny_gpt2}", "model.task=causal-lm"))
    with pytest.raises(ModelError, match="no linear layer"):
        _ = setup.spec
