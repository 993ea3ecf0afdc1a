"""Stacked layers against the plain ones, model by model; the same for optimizers, packed attention,
chunks and kept features.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedtune.adapters.layers.fed_sb import SBLinear
from fedtune.adapters.layers.lora import LoRALinear
from fedtune.adapters.layers.stacked import Examples, NotStackable, Rows
from fedtune.errors import EnvironmentProblem
from fedtune.job import FederationSection
from fedtune.models.packed import NotPackable, PackedModel, Packing
from fedtune.tasks import TASKS
from fedtune.training import optimizers
from fedtune.training.chunks import UNEVEN, Picked, balanced, stretches
from fedtune.training.features import FeatureStore
from fedtune.training.stacked import Stack

CPU = torch.device("cpu")
MODELS = 3


class Inside(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def sb(outputs=5):
    draw = np.random.default_rng(1)
    return SBLinear(
        nn.Linear(6, outputs), draw.standard_normal((2, 6)), draw.standard_normal((outputs, 2)), 0.5
    )


def batch_norm():
    layer = nn.BatchNorm2d(4).eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


LAYERS = {
    "fed-sb": (sb, ["core.weight"], (6,)),
    "lora": (lambda: LoRALinear(nn.Linear(6, 5), 2, 0.7), ["up.weight", "down.weight"], (6,)),
    "linear": (lambda: nn.Linear(6, 5), ["weight", "bias"], (6,)),
    "linear bias": (lambda: nn.Linear(6, 5), ["bias"], (6,)),
    "linear weight": (lambda: nn.Linear(6, 5), ["weight"], (6,)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), ["weight"], (6,)),
    "norm": (lambda: nn.LayerNorm(6), ["weight", "bias"], (6,)),
    "norm bias": (lambda: nn.LayerNorm(6), ["bias"], (6,)),
    "norm weight": (lambda: nn.LayerNorm(6), ["weight"], (6,)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), ["weight", "bias"], (4, 7, 7)),
    "conv bias": (lambda: nn.Conv2d(4, 6, 3), ["bias"], (4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), ["weight"], (4, 7, 7)),
    "conv weight": (lambda: nn.Conv2d(4, 6, 1), ["weight"], (4, 5, 5)),
    "batch norm": (batch_norm, ["weight", "bias"], (4, 5, 5)),
    "batch norm bias": (batch_norm, ["bias"], (4, 5, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), ["weight", "bias"], (4, 5, 5)),
    "group norm weight": (lambda: nn.GroupNorm(2, 4), ["weight"], (4, 5, 5)),
    "embedding": (lambda: nn.Embedding(9, 6), ["weight"], None),
}
OWNERS = {
    "ragged": [2, 0, 0, 2, 0, 1],
    "dense": [0, 0, 1, 1, 2, 2],
    "one has none": [0, 2, 2, 0, 2, 2],
    "one each": [0, 1, 2],
}


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize(("make", "trained", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("how", ["examples", "padded", "packed"])
def test_a_stacked_layer_is_each_model_alone(how, make, trained, shape, owner):
    if how != "examples" and shape is not None and len(shape) == 3:
        pytest.skip("images have no tokens")
    torch.manual_seed(0)
    holder, owner = Inside(make()), np.array(owner)
    layer = holder.layer
    parameters = {name: p for name, p in layer.named_parameters() if name in trained}
    values = {name: torch.randn(MODELS, *p.shape, requires_grad=True) for name, p in parameters.items()}
    lengths = np.arange(1, len(owner) + 1)
    lead = {"examples": (len(owner),), "padded": (len(owner), 4), "packed": (1, int(lengths.sum()))}[how]
    x = torch.randint(0, 9, lead) if shape is None else torch.randn(*lead, *shape, requires_grad=True)
    stack = Stack(holder, {f"layer.{name}": p for name, p in parameters.items()})
    with stack.installed():
        assert holder.layer is not layer
        stack.set(
            {f"layer.{name}": v for name, v in values.items()},
            Examples(owner, MODELS, lengths if how == "packed" else None, CPU),
        )
        found = holder(x)
    assert holder.layer is layer
    weights = torch.randn_like(found)
    wanted_by = list(values.values()) + ([] if shape is None else [x])
    gradients = torch.autograd.grad((found * weights).sum(), wanted_by)
    owners = np.repeat(owner, lengths if how == "packed" else 4 if how == "padded" else 1)
    total = 0
    for k in range(MODELS):
        mine = torch.from_numpy(owners == k).view(lead)
        out = torch.func.functional_call(layer, {name: v[k] for name, v in values.items()}, (x,))
        torch.testing.assert_close(found[mine], out[mine], atol=1e-5, rtol=1e-5)
        total = total + (out * weights)[mine].sum()
    for one, other in zip(gradients, torch.autograd.grad(total, wanted_by)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_layers_that_cannot_be_stacked_are_named():
    holder = Inside(nn.ConvTranspose2d(2, 4, 1))
    with pytest.raises(NotStackable, match=r"^layer\.weight lies in a layer that cannot be stacked$"):
        Stack(holder, {"layer.weight": holder.layer.weight})
    holder = Inside(nn.Linear(3, 3))
    stack = Stack(holder, {"layer.bias": holder.layer.bias})
    with stack.installed(), pytest.raises(NotStackable, match=r"it sees \(3,\) where there are 2$"):
        stack.set({"layer.bias": torch.zeros(2, 3)}, Examples(np.array([0, 1]), 2, None, CPU))
        holder(torch.zeros(3, 3))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_rows_come_back(owner):
    rows = Rows(np.array(owner), 5, CPU)
    x = torch.arange(2.0 * len(owner)).view(-1, 2) + 1
    together = rows.gather(x)
    assert torch.equal(rows.scatter(together), x)
    for k in range(5):
        mine = x[torch.tensor(owner) == k]
        assert torch.equal(together[k, : len(mine)], mine) and not together[k, len(mine) :].any()
    assert torch.equal(rows.belongs.argmax(1), torch.tensor(owner))


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=50), st.integers(1, 200), st.booleans())
def test_stretches_hold_all_and_not_too_much(lengths, rows, padded):
    lengths = np.sort(np.array(lengths, np.int64))
    parts = stretches(lengths, rows, padded)
    assert np.array_equal(np.concatenate([np.zeros(0, np.int64), *parts]), np.arange(len(lengths)))
    for part in parts:
        size = lengths[part]
        assert len(part) == 1 or (size.max() * len(size) if padded else size.sum()) <= rows
        assert not padded or size.max() * len(size) <= 1.1 * size.sum() or len(part) == 1


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("other", [0.01, 0.1])
def test_optimizers_are_those_of_torch(kind, decay, momentum, other):
    """Rows drop out as their steps end; two rates stand side by side, or one is for all."""
    if kind == "adamw" and momentum:
        pytest.skip("adamw has no momentum key")
    torch.manual_seed(0)
    section = FederationSection(optimizer=kind, weight_decay=decay, momentum=momentum)
    models, steps = torch.randn(3, 4), (5, 3, 1)
    rates = 0.1 if other == 0.1 else torch.tensor([0.1, 0.1, other, other])
    gradients = torch.randn(max(steps), 3, 4)
    plain = []
    for k, count in enumerate(steps):
        halves = [models[k, :2].clone().requires_grad_(), models[k, 2:].clone().requires_grad_()]
        groups = [{"params": [halves[0]], "lr": 0.1}, {"params": [halves[1]], "lr": other}]
        optimizer = (
            torch.optim.SGD(groups, momentum=momentum, weight_decay=decay)
            if kind == "sgd"
            else torch.optim.AdamW(groups, weight_decay=decay)
        )
        for g in gradients[:count, k]:
            halves[0].grad, halves[1].grad = g[:2].clone(), g[2:].clone()
            optimizer.step()
        plain.append(torch.cat([h.detach() for h in halves]))
    moments = optimizers.start(models, section)
    for step, g in enumerate(gradients):
        active = sum(count > step for count in steps)
        optimizers.update(models[:active], g[:active].clone(), moments, rates, step + 1, section)
    torch.testing.assert_close(models, torch.stack(plain))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_packed_attention_is_attention_of_each_text(causal, heads):
    torch.manual_seed(0)
    packing = Packing([1, 3, 3, 5], CPU)
    q = torch.randn(1, 4, 12, 8)
    k, v = torch.randn(1, heads, 12, 8), torch.randn(1, heads, 12, 8)
    found, begin = packing.attend(q, k, v, 0.3, causal), 0
    assert packing.positions.tolist() == [0, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4]
    for length in (1, 3, 3, 5):
        part = slice(begin, begin + length)
        kk, vv = (x[:, :, part].repeat_interleave(4 // heads, 1) for x in (k, v))
        scores = q[:, :, part] @ kk.transpose(2, 3) * 0.3
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(found[:, part], (scores.softmax(-1) @ vv).transpose(1, 2))
        begin += length


def test_images_do_not_pack():
    from fedtune.models.base import TunableModel

    with pytest.raises(NotPackable):
        PackedModel(TunableModel(nn.Identity(), TASKS["image-classification"], nn.Linear(2, 2)))


@pytest.mark.parametrize("disk", [False, True])
def test_feature_store(disk, tmp_path):
    store = FeatureStore(100, tmp_path if disk else None)
    arrays = {("a", i): np.full((2, 5), i, np.float32) for i in range(3)}  # 40 bytes each
    for key, array in arrays.items():
        store.put(key, array)
        assert ("a", 0) not in arrays or store.get(("a", 0)) is not None or key == ("a", 2)
    kept = {key for key in arrays if store.get(key) is not None}
    # on disk what came first stays, in memory what was used last
    assert kept == ({("a", 0), ("a", 1)} if disk else {("a", 0), ("a", 2)})
    for key in kept:
        assert np.array_equal(store.get(key), arrays[key])
    store.close()
    assert store.get(("a", 0)) is None and not list(tmp_path.iterdir())


def test_features_on_a_full_disk_are_one_line(tmp_path):
    store = FeatureStore(10**6, tmp_path)
    store.put(("a", 0), np.zeros(4, np.float32))
    store._file.close()
    store._file = open("/dev/full", "w+b", buffering=0)  # noqa: SIM115 (closed with the store)
    with pytest.raises(
        EnvironmentProblem, match=r"^cannot write .*features\.tmp: No space left on device; free space"
    ):
        store.put(("a", 1), np.zeros(4, np.float32))
    store.close()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300)), min_size=1, max_size=60))
def test_balanced_parts_hold_all_and_need_little_room(examples):
    row, lengths = (np.array(x, np.int64) for x in zip(*examples))
    n = len(row)
    whole = Picked(
        [("c", i) for i in range(n)],
        [{"x": i} for i in range(n)],
        np.arange(n),
        lengths,
        row,
        np.ones(n, np.float32),
    )
    parts = balanced(whole)
    assert sorted(np.concatenate([p.labels for p in parts]).tolist()) == list(range(n))
    for part in parts:
        rows = np.bincount(part.row, part.lengths)
        assert np.count_nonzero(rows) * rows.max() <= UNEVEN * rows.sum()
        assert np.all(np.diff(part.labels) > 0)  # in the order they had
