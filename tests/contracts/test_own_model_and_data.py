"""A module and data that Python passed: on both engines alike, with every method, and refused in one line
where they do not hold what they should.
"""

import numpy as np
import pytest
import torch
from torch import nn

import fedtune
from fedtune.errors import DataError, ModelError, RunError, UserError

JOB = {
    "adapter": {"method": "lora", "rank": 2},
    "federation": {"rounds": 2, "cohort": 3, "lr": 0.05, "optimizer": "sgd", "batch-size": 4},
    "evaluation": {"baselines": []},
    "report": {"html": False},
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    """[n, 2, 3] -> [n, 3]. The head is not the last layer that is named, and another linear has its shape."""

    def __init__(self):
        super().__init__()
        self.classify = nn.Linear(6, 3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.decoy = nn.Linear(6, 3)

    def forward(self, x):
        x = x.flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.classify(x + 0 * self.decoy(x).sum(1, keepdim=True))


def net():
    torch.manual_seed(0)
    return Net()


def data(clients=4, examples=12):
    draw, centers = np.random.default_rng(0), np.random.default_rng(1).standard_normal((3, 2, 3))
    labels = draw.integers(0, 3, (clients, examples))
    return {
        f"site-{k}": [(centers[y] + 0.3 * draw.standard_normal((2, 3)), int(y)) for y in its]
        for k, its in enumerate(labels)
    }


def changed(**sections):
    return {name: {**JOB.get(name, {}), **sections.get(name, {})} for name in {**JOB, **sections}}


@pytest.mark.parametrize("method", ["fed-sb", "lora", "ffa-lora", "bias", "head", "full"])
def test_an_own_module_is_the_same_on_both_engines(method, tmp_path):
    module, runs = net(), {}
    before = {name: t.clone() for name, t in module.state_dict().items()}
    notes = []
    for engine in ("vectorised", "serial"):
        job = changed(adapter={"method": method}, simulation={"engine": engine})
        runs[engine] = fedtune.simulate(
            job, out=tmp_path / engine, model=module, data=data(), note=notes.append
        )
    ours, theirs = (run.folder.newest().state.arrays for run in runs.values())
    assert "head.weight" in ours and ours["head.weight"].shape == (3, 6) and notes == []
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    start = runs["serial"].folder.first_arrays()
    assert any(not np.array_equal(start[name], ours[name]) for name in ours)
    np.testing.assert_array_equal(start["head.weight"], before["classify.weight"])
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_what_a_run_of_an_own_module_gives(tmp_path):
    job = changed(federation={"rounds": 6, "local-epochs": 4}, adapter={"method": "full"})
    run = fedtune.simulate(job, out=tmp_path / "run", model=net(), data=data())
    pairs = [pair for its in data().values() for pair in its]
    right = np.mean([int(a) == y for a, (_, y) in zip(run.predict(x for x, _ in pairs), pairs)])
    assert right > 0.8 > run.rounds[0]["accuracy"]
    again = fedtune.open_run(tmp_path / "run", model=net(), data=data())
    inputs = [x for x, _ in pairs[:5]]
    np.testing.assert_array_equal(again.scores(inputs), run.scores(inputs))
    logits = run.model()(inputs=torch.tensor(np.stack(inputs), dtype=torch.float32))
    np.testing.assert_allclose(logits.softmax(-1).numpy(), run.scores(inputs), atol=1e-6)
    plain = fedtune.open_run(tmp_path / "run")
    assert plain.rounds == run.rounds
    with pytest.raises(RunError, match="began with data and model passed from Python; give the same"):
        plain.predict(inputs)
    with pytest.raises(RunError, match="began with another module or other data"):
        fedtune.open_run(tmp_path / "run", model=net(), data=data(examples=13))
    with pytest.raises(DataError, match="the input of place 0 is no text and no array of numbers but str"):
        run.predict(["a text"])


def test_a_run_of_an_own_module_goes_on_and_only_with_the_same(tmp_path):
    def stop(line):
        if line["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedtune.simulate(JOB, out=tmp_path / "run", model=net(), data=data(), on_round=stop)
    torch.manual_seed(1)
    with pytest.raises(RunError, match="began with a base of sha256"):
        fedtune.simulate(JOB, out=tmp_path / "run", model=Net(), data=data())
    with pytest.raises(RunError, match="no longer holds what it held when the run began"):
        fedtune.simulate(JOB, out=tmp_path / "run", model=net(), data=data(examples=13))
    run = fedtune.simulate(JOB, out=tmp_path / "run", model=net(), data=data())
    whole = fedtune.simulate(JOB, out=tmp_path / "whole", model=net(), data=data())
    for name, array in whole.folder.newest().state.arrays.items():
        np.testing.assert_array_equal(run.folder.newest().state.arrays[name], array)


def test_the_command_line_says_that_python_is_needed(tmp_path):
    from fedtune.workflows.setup import open_setup

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedtune.simulate(JOB, out=tmp_path / "run", model=net(), data=data(), on_round=stop)
    with pytest.raises(ModelError, match="'own:Net': a module that was passed from Python; pass it again"):
        open_setup(fedtune.open_run(tmp_path / "run").job)


def test_privacy_for_examples_holds_for_an_own_module(tmp_path):
    job = changed(
        federation={"weighting": "equal", "rounds": 1},
        privacy={"unit": "example", "clip": 0.5, "noise-multiplier": 1.0, "examples": 10, "delta": 1e-3},
    )
    run = fedtune.simulate(job, out=tmp_path / "run", model=net(), data=data())
    assert 0 < run.summary["privacy"]["epsilon"] < float("inf")


def test_texts_of_ones_own_go_with_the_base_of_the_job(tiny_bert, tmp_path):
    texts = {
        "one": [("bright lovely film", "good"), ("dull awful meal", "bad")] * 4,
        "two": ([("a fine room", "good"), ("sad book", "bad")], [("warm and glad", "good")]),
    }
    job = changed(model={"source": str(tiny_bert), "max-length": 16}, federation={"cohort": 2})
    run = fedtune.simulate(job, out=tmp_path / "run", data=texts)
    assert run.summary["labels"] == ["bad", "good"] and set(run.predict(["so lovely"])) <= {"bad", "good"}
    assert run.rounds[-1]["evaluated"] == 2 + 1
    assert run.job.data.source == "own:data"


class Wide(Net):
    def forward(self, x):
        return torch.cat([super().forward(x)] * 2, 1)


class Spoiled(Net):
    def forward(self, x):
        return super().forward(x) * float("nan")


class Headless(Net):
    def forward(self, x):
        return super().forward(x) * 1.0


def halves():
    return net().half()


def broken():
    module = net()
    module.decoy.weight.data[0, 0] = float("inf")
    return module


@pytest.mark.parametrize(
    "model, words",
    [
        (
            Wide,
            (
                r"model Wide: its forward pass gives \[2, 6\] for 2 examples; "
                r"it should give a tensor \[2, 3\]"
            ),
        ),
        (Spoiled, "model Spoiled: its forward pass gives numbers that are not finite"),
        (Headless, r"model Headless: its result is not that of an nn\.Linear"),
        (halves, r"model Net: its weight \S+ is float16; it should be float32"),
        (broken, r"model Net: its weight decoy\.weight holds a number that is not finite"),
        (lambda: nn.Linear(5, 3), r"model Linear: its forward pass fails on a batch \[2, 2, 3\] \("),
        (lambda: 3, r"model: is a int; give a torch\.nn\.Module"),
    ],
)
def test_a_module_that_lacks_something_is_named_before_anything_is_written(model, words, tmp_path):
    with pytest.raises(ModelError, match=words) as caught:
        fedtune.simulate(JOB, out=tmp_path / "run", model=model(), data=data())
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


ARRAY = np.ones((2, 3))


@pytest.mark.parametrize(
    "given, words",
    [
        ([], "data: is a list; give a mapping from the name of each client"),
        ({}, "data: is a dict that holds nothing; give a mapping"),
        ({1: [(ARRAY, 0)] * 2}, "data: 1 is no name of a client"),
        ({"a": 3}, "client 'a' has a int; give a sequence or a dataset"),
        ({"a": [ARRAY, ARRAY, ARRAY]}, "example 0 of client 'a' is a ndarray; give a pair"),
        ({"a": [(ARRAY, 0), (np.ones(3), 1)]}, r"the input of a/1 has shape \[3\], that of a/0 \[2, 3\]"),
        ({"a": [(ARRAY, 0), ("text", 1)]}, "the input of a/1 is a text, that of a/0 is not"),
        ({"a": [(ARRAY * np.nan, 0), (ARRAY, 1)]}, "the input of a/0 holds a number that is not finite"),
        (
            {"a": [(ARRAY, 0.5), (ARRAY, 1)]},
            ("the label of a/0 is a float; give integers from 0 on, or strings"),
        ),
        ({"a": [(ARRAY, -1), (ARRAY, 1)]}, "the label -1 of a/0 is not one of 2"),
        ({"a": [(ARRAY, 0), (ARRAY, 0)]}, "holds 1 label, a classifier needs at least 2"),
        ({"a": []}, "client 'a' has 0 examples, which leaves none to train on"),
        ({"a": [("text", 0), ("text", 1)]}, "data: holds texts, a module of one's own takes arrays"),
        (None, "data: a module of one's own needs data of one's own"),
    ],
)
def test_data_that_lacks_something_is_named_before_anything_is_written(given, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        fedtune.simulate(JOB, out=tmp_path / "run", model=net(), data=given)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "section, words",
    [
        (
            {"data": {"partition": "iid"}},
            (
                r'data\.partition = "iid": is not read where '
                r"data is passed from Python"
            ),
        ),
        ({"model": {"pooling": "first"}}, r'model\.pooling = "first": is not read where model is passed'),
        ({"model": {"task": "causal-lm"}}, r'model\.task = "causal-lm": a module of one.s own gives labels'),
        (
            {
                "units": {"strategy": "top", "fit": True},
                "simulation": {"devices": [{"name": "small", "share": 1.0, "memory-mb": 10}]},
            },
            r"units\.fit = true: budgets are not fitted",
        ),
        ({"model": {"source": "./llama"}}, r'model\.source = "\./llama": is not read where model is passed'),
    ],
)
def test_a_key_that_is_not_read_is_said(section, words, tmp_path):
    with pytest.raises(UserError, match=words):
        fedtune.simulate(changed(**section), out=tmp_path / "run", model=net(), data=data())
