"""What every adapter method keeps, whichever it is: each is tried on all the tiny bases that it can train."""

import ast
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

import fedtune
from fedtune.adapters import methods
from fedtune.adapters.describe import describe
from fedtune.adapters.kinds.table import METHODS
from fedtune.adapters.layers.stacked import Examples
from fedtune.errors import ModelError
from fedtune.job import AdapterSection
from fedtune.models.base import TunableModel, layout
from fedtune.tasks import TASKS
from fedtune.training.lean import Lean
from fedtune.training.stacked import Stack

ROOT = Path(fedtune.__file__).parent
OWNERS = np.array([0, 1, 1, 0, 1])
AMBIGUOUS = {"head", "bias"}
"""Names of methods that units and parameters have as well."""


class Bottleneck(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.widen = nn.Conv2d(inputs, 12, 1)
        self.deep = nn.Conv2d(12, 12, 3, stride, 1, groups=12)
        self.narrow = nn.Conv2d(12, outputs, 1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.narrow(torch.relu(self.deep(torch.relu(self.widen(x))))))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.blocks = nn.ModuleList([Bottleneck(4, 6, 2), Bottleneck(6, 6, 1)])

    def forward(self, pixels):
        x = torch.relu(self.stem(pixels))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(3, 6), nn.ModuleList([Mixer(), Mixer()])

    def forward(self, pixels):
        x = self.stem(pixels.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


BASES = {"convolutions": Convolutions, "linears": Linears}


def tiny(base):
    torch.manual_seed(0)
    return TunableModel(BASES[base](), TASKS["image-classification"], nn.Linear(6, 3)).eval()


def spec_of(name, base, **changes):
    return describe(layout(tiny(base)), AdapterSection(method=name, rank=2, alpha=3.0, **changes))


def fits(name, base):
    try:
        return bool(spec_of(name, base))
    except ModelError:
        return False


CASES = [(name, base) for name in METHODS for base in BASES if fits(name, base)]
on_each = pytest.mark.parametrize(("name", "base"), CASES)


def pixels():
    return torch.randn(len(OWNERS), 3, 8, 8, generator=torch.Generator().manual_seed(1))


def frame_of(spec, init="weights"):
    model = tiny(base_of(spec))
    return METHODS[spec.method].frame(spec, init, 3, lambda x: model.linear(x.name).weight.detach().numpy())


def base_of(spec):
    return "linears" if spec.linears else "convolutions"


def drawn(spec, seed):
    rng = np.random.default_rng(seed)
    return {t.name: (0.3 * rng.standard_normal(t.shape)).astype(np.float32) for t in spec.trainable}


def attached(spec, base, arrays):
    model = tiny(base)
    parameters = methods.attach(model, spec, frame_of(spec))
    methods.write(parameters, arrays)
    return model, parameters


def test_the_tables_and_the_job_name_the_same():
    field = AdapterSection.model_fields["method"]
    assert list(METHODS) == list(methods.ATTACHMENTS) == field.json_schema_extra["available"]
    assert set(METHODS) <= set(get_args(field.annotation))
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("name", METHODS)
def test_each_has_a_base_that_it_can_train(name):
    assert name in {fitting for fitting, _ in CASES}


@on_each
def test_names_and_shapes_agree(name, base):
    spec, model = spec_of(name, base), tiny(base)
    wanted = [(t.name, t.shape) for t in spec.trainable]
    for init in ("weights", "random"):
        frame = frame_of(spec, init)
        assert {key: a.shape for key, a in frame.items()} == {t.name: t.shape for t in spec.frame}
    start = methods.initial(model, spec, {}, 0)
    assert [(key, a.shape) for key, a in start.items()] == wanted
    assert all(a.dtype == np.float32 for a in (*start.values(), *frame.values()))
    parameters = methods.attach(model, spec, frame)
    assert [(key, tuple(p.shape)) for key, p in parameters.items()] == wanted
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters.values()}


@on_each
@pytest.mark.parametrize("train_head", [True, False])
def test_the_head_is_trained_where_the_job_says_so(name, base, train_head):
    if not train_head and METHODS[name].head_only:
        return  # the job refuses it
    spec = spec_of(name, base, train_head=train_head)
    assert spec.head_size == (3 * 6 + 3 if train_head else 0)
    assert METHODS[name].head_only == (spec.head_size == spec.size)


@on_each
def test_it_starts_as_the_base(name, base):
    spec = spec_of(name, base)
    model, _ = attached(spec, base, methods.initial(tiny(base), spec, {}, 0))
    assert torch.equal(model(pixels=pixels()), tiny(base)(pixels=pixels()))


@on_each
def test_merged_is_attached(name, base):
    spec, merged = spec_of(name, base), tiny(base)
    arrays = drawn(spec, 0)
    methods.merge(merged, spec, frame_of(spec), arrays)
    found = merged(pixels=pixels())
    torch.testing.assert_close(found, attached(spec, base, arrays)[0](pixels=pixels()), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, tiny(base)(pixels=pixels()), atol=1e-3)


@on_each
def test_what_a_lora_is_told_is_the_merged_weight(name, base):
    method, spec, merged = METHODS[name], spec_of(name, base), tiny(base)
    assert (method.lora_factors is None) == bool(method.no_lora)
    if method.lora_factors is None:
        assert not spec.linears and name in method.no_lora
        return
    arrays, frame = drawn(spec, 0), frame_of(spec)
    methods.merge(merged, spec, frame, arrays)
    assert spec.linears
    for linear in spec.linears:
        b, a = method.lora_factors(frame, arrays, linear.name)
        assert (b.shape, a.shape) == ((linear.outputs, spec.rank), (spec.rank, linear.inputs))
        wanted = tiny(base).linear(linear.name).weight + spec.scale * torch.from_numpy(b @ a)
        torch.testing.assert_close(merged.linear(linear.name).weight, wanted)


@on_each
def test_stacked_is_each_model_alone(name, base):
    spec = spec_of(name, base)
    each = [drawn(spec, seed) for seed in (0, 1)]
    model, parameters = attached(spec, base, methods.initial(tiny(base), spec, {}, 0))
    stack = Stack(model, parameters)
    values = {key: torch.from_numpy(np.stack([arrays[key] for arrays in each])) for key in parameters}
    with stack.installed():
        stack.set(values, Examples(OWNERS, 2, None, torch.device("cpu")))
        found = model(pixels=pixels())
    for place, arrays in enumerate(each):
        alone, mine = attached(spec, base, arrays)[0](pixels=pixels()), torch.from_numpy(place == OWNERS)
        torch.testing.assert_close(found[mine], alone[mine], atol=1e-5, rtol=1e-5)


@on_each
def test_a_lean_step_has_the_gradients_of_a_stock_one(name, base):
    spec = spec_of(name, base)
    model, parameters = attached(spec, base, drawn(spec, 0))
    stock = torch.autograd.grad(model(pixels=pixels()).square().sum(), list(parameters.values()))
    with Lean(model).running():
        lean = torch.autograd.grad(model(pixels=pixels()).square().sum(), list(parameters.values()))
    for one, other in zip(lean, stock):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@on_each
def test_a_core_is_a_square_for_each_linear(name, base):
    spec = spec_of(name, base, train_head=METHODS[name].head_only)
    if METHODS[name].cores:
        assert [t.shape for t in spec.trainable] == [(spec.rank, spec.rank)] * len(spec.linears)
    if METHODS[name].biases_only:
        assert all(t.name.endswith(".bias") for t in spec.trainable)


OUTSIDE = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] != "adapters"]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_outside_asks_for_a_methods_name(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.lineno for node in ast.walk(tree) if asks_for_a_name(node)] == []


def asks_for_a_name(node):
    """A comparison or a match of a method's name with a constant, or a table in the place of one."""
    if isinstance(node, ast.Compare):
        sides = (node.left, *node.comparators)
        said = {text for side in sides for text in constants(side)}
        return bool(said & (METHODS.keys() - AMBIGUOUS)) or (bool(said) and any(is_a_name(s) for s in sides))
    if isinstance(node, ast.Match):
        return is_a_name(node.subject)
    if isinstance(node, ast.Dict):
        said = {text for key in node.keys if key is not None for text in constants(key)}
        return len(said & METHODS.keys()) > 1 and bool(said & (METHODS.keys() - AMBIGUOUS))
    return isinstance(node, ast.Subscript) and is_a_name(node.slice) and isinstance(node.value, ast.Dict)


def constants(node):
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def is_a_name(node):
    return ast.unparse(node).endswith(("adapter.method", "spec.method"))


@pytest.mark.parametrize(
    "text, asks",
    [
        ('job.adapter.method == "head"', True),
        ('spec.method in ("lora", "other")', True),
        ('name != "tinytl"', True),
        ('{"fed-sb": 1, "lora": 2}.get(name)', True),
        ('{"a": 1}[job.adapter.method]', True),
        ('match spec.method:\n    case "full":\n        pass', True),
        ('unit == "head"', False),
        ("manifest.spec.method == job.adapter.method", False),
        ("job.adapter.method in HEAD_ONLY", False),
        ("METHODS[spec.method]", False),
    ],
)
def test_the_search_finds_what_it_looks_for(text, asks):
    assert any(asks_for_a_name(node) for node in ast.walk(ast.parse(text))) == asks
