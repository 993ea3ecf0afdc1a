"""A plan's figures against formulas, against what a run really sent,
and against what autograd really keeps.
"""

import shutil
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fedtune.adapters import methods
from fedtune.errors import DataError, ModelError, UserError
from fedtune.models.base import TunableModel
from fedtune.models.load import sketch_model
from fedtune.models.sources import check_hash, locate
from fedtune.tasks import TASKS
from fedtune.training.lean import Lean
from fedtune.training.memory import saved_bytes
from fedtune.training.together import kept_bytes
from fedtune.workflows.plan import holders, make_plan
from fedtune.workflows.setup import data_free_frame, open_setup


@pytest.mark.parametrize(
    "method, numbers", [("fed-sb", 36 * 16**2), ("lora", 6 * (4 * 16 * (384 + 384) + 2 * 16 * (384 + 1536)))]
)
def test_trainable_numbers_and_bytes_are_the_formulas(method, numbers, minilm_folder, vader_folder):
    from fedtune.job import parse_job

    plan = make_plan(parse_job("", [f"adapter.method={method}"]))
    assert plan.trainable - plan.head == numbers and plan.head == 2 * 384 + 2
    assert abs(plan.update_bytes - 4 * plan.trainable) <= 0.02 * 4 * plan.trainable + 1024
    assert sum(u.numbers for u in plan.units) == plan.trainable
    assert plan.base_parameters == 22_713_216


@pytest.mark.parametrize(
    "changes", [(), ("adapter.init=gradient", "adapter.init-clients=3", "adapter.init-examples=8")]
)
def test_bytes_are_those_of_a_run(tiny_job, run_rounds, tmp_path, changes):
    job = tiny_job(*changes)
    plan, simulation = make_plan(job), run_rounds(job, tmp_path / "run")
    line = simulation.run.metrics()[-1]
    met = {name for x in simulation.run.metrics() for name in x["clients"]}
    planned = 3 * plan.round_bytes + len(met) * plan.frame_bytes + plan.init_bytes
    assert line["total_bytes"] == planned
    assert (plan.init_bytes > 0) == bool(changes)


def test_expected_holders():
    assert holders(10, 10, 1) == 10 and holders(10, 1, 1) == pytest.approx(1)
    assert holders(4, 2, 2) == pytest.approx(3)  # 2, then half of the other 2


def test_weights_are_not_needed(tiny_job, tiny_bert, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_bert / "config.json", bare)
    with_weights, without = make_plan(tiny_job()), make_plan(tiny_job(f"model.source={bare}"))
    assert (
        with_weights.weights
        and not without.weights
        and any("weights are not here" in n for n in without.notes)
    )
    assert (without.trainable, without.total_bytes, without.device) == (
        with_weights.trainable,
        with_weights.total_bytes,
        with_weights.device,
    )


def test_data_is_not_needed_when_the_job_says_what_it_is(tiny_job, tmp_path):
    known = make_plan(tiny_job(f"data.source={tmp_path}/none.csv", 'data.labels=["bad", "good"]'))
    assert (
        known.clients == 6
        and known.trainable == make_plan(tiny_job()).trainable
        and "was not read" in known.notes[0]
    )
    with pytest.raises(
        DataError, match=r"none\.csv: does not exist; .*; or name data\.labels and data\.clients"
    ):
        make_plan(tiny_job(f"data.source={tmp_path}/none.csv"))


def test_data_that_is_wrong_is_not_planned_around(tiny_job, tmp_path):
    (tmp_path / "wrong.csv").write_text("text,label,domain\na,good,x\nb,bad,x\n")
    with pytest.raises(
        DataError,
        match=r"data\.clients = 6: domain 'x' has 2 rows for its 6 clients; at most 2 clients can be had$",
    ):
        make_plan(tiny_job(f"data.source={tmp_path}/wrong.csv", 'data.labels=["bad", "good"]'))
    with pytest.raises(UserError, match="package 'none' is not known"):
        make_plan(tiny_job("data.source=package:none", 'data.labels=["bad", "good"]'))


def test_data_that_was_not_fetched_is_planned_around(tiny_job, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    assert (
        make_plan(tiny_job("data.source=package:vader-icwsm-2014", 'data.labels=["bad", "good"]')).clients
        == 6
    )


def test_a_plan_checks_the_hash_of_weights_that_are_there(tiny_job, tiny_bert):
    right = check_hash(locate(str(tiny_bert)), "")
    assert make_plan(tiny_job(f"model.sha256={right}")).weights
    with pytest.raises(ModelError, match=r"model\.sha256 = aaaaaaaaaaaa"):
        make_plan(tiny_job(f"model.sha256={'a' * 64}"))


def test_a_base_without_linears_names_the_method(tiny_job, tiny_gpt2):
    with pytest.raises(
        ModelError,
        match=(
            r"adapter\.method = 'lora': this base has no linear layer inside its "
            r"blocks; use \"bias\" or \"full\""
        ),
    ):
        make_plan(tiny_job(f"model.source={tiny_gpt2}", "model.task=causal-lm", "adapter.method=lora"))


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError])
def test_memory_of_a_base_that_needs_values_is_not_known(error, tiny_job, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr("fedtune.training.memory._loss", fail)
    assert make_plan(tiny_job()).device["activations"] is None


@pytest.mark.parametrize("lean", ["off", "exact", "all"])
@pytest.mark.parametrize("method", ["fed-sb", "lora", "bias", "full", "head"])
def test_saved_bytes_are_those_that_autograd_keeps(tiny_job, method, lean):
    job = tiny_job(f"adapter.method={method}")
    setup = open_setup(job)
    model = setup.fresh_model()
    frame = data_free_frame(setup, model)
    methods.attach(model, setup.spec, frame)
    batch = {"input_ids": torch.full((8, 16), 5), "attention_mask": torch.ones(8, 16, dtype=torch.long)}
    with (
        kept_bytes(model) as kept,
        Lean(model, lean == "exact").running() if lean != "off" else nullcontext(),
    ):
        model.loss(model(**batch), batch, torch.zeros(8, dtype=torch.long))[0].sum()

    sketch = sketch_model(job.model, setup.source, setup.classes)
    with torch.device("meta"):
        methods.attach(sketch, setup.spec, frame)
    planned = saved_bytes(sketch, 8, 16, lean)
    assert planned is not None and planned.bytes == pytest.approx(sum(kept.values()), rel=0.03)


def test_a_plan_shows_what_lean_steps_keep(tiny_job):
    lean, stock = (make_plan(tiny_job(f"federation.lean={value}")) for value in ("all", "off"))
    assert (
        lean.device["activations"]
        < stock.device["activations"]
        == lean.device["activations_without_lean"]
        == stock.device["activations_without_lean"]
    )
    assert (
        lean.device["total"] - lean.device["activations"]
        == stock.device["total"] - stock.device["activations"]
    )
    private = make_plan(
        tiny_job(
            "federation.lean=all",
            "privacy.unit=example",
            "privacy.epsilon=8.0",
            "privacy.clip=1.0",
            "privacy.examples=16",
            "federation.weighting=equal",
        )
    )
    # gradients by example are made from what stock torch keeps
    assert private.device["activations"] == stock.device["activations"]


class Gated(nn.Module):
    """A convolution with an activation and, if asked for, a squeeze-and-excitation gate."""

    def __init__(self, activation, gate):
        super().__init__()
        self.conv, self.norm, self.activation, self.gate = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            activation,
            gate,
        )

    def forward(self, pixels):
        x = self.activation(self.norm(self.conv(pixels)))
        return (x * x.mean((2, 3), keepdim=True).sigmoid() if self.gate else x).mean((2, 3))


@pytest.mark.parametrize(
    "activation, gate, kept, curved",
    [
        (nn.ReLU6(), False, 1 / 8, 0),
        (nn.Hardswish(), False, 2, 2),
        (nn.SiLU(), False, 2, 2),
        (nn.ReLU6(), True, 1 / 8 + 4, 4),
    ],
)
def test_curved_activations_and_gates_are_told_what_they_cost(activation, gate, kept, curved):
    """Bytes a value, from shapes alone."""
    model = (
        TunableModel(Gated(activation, gate), TASKS["image-classification"], nn.Linear(8, 2))
        .eval()
        .requires_grad_(False)
    )
    model.body.norm.bias.requires_grad_(True)
    found = saved_bytes(model, 4, 32, "all")
    values = 4 * 8 * 32 * 32
    assert found.bytes == pytest.approx(kept * values, rel=0.02) and found.curved == pytest.approx(
        curved * values, rel=0.02
    )
