"""A task is one object: nothing outside asks for its name, and every task keeps the same promises."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fedtune
from fedtune.data.images import ImageEncoder
from fedtune.data.text import TextEncoder
from fedtune.errors import ContractError
from fedtune.job import ModelSection
from fedtune.models.base import TunableModel
from fedtune.models.losses import LOSSES, Loss
from fedtune.tasks import TASKS, Right, cross_entropy, task_named
from fedtune.tasks.images import IMAGES
from fedtune.tasks.texts import TEXTS

ROOT = Path(fedtune.__file__).parent
OUTSIDE = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT / "tasks")
ENCODERS = {"TextEncoder", "ImageEncoder"}
LENGTHS = (5, 3, 1, 4)
CLASSES = 7


def names_in(node: ast.AST) -> set[str]:
    """Names, attributes and strings that stand in a piece of code."""
    found = list(ast.walk(node))
    return (
        {n.id for n in found if isinstance(n, ast.Name)}
        | {n.attr for n in found if isinstance(n, ast.Attribute)}
        | {n.value for n in found if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    )


def choices(tree: ast.AST) -> list[tuple[int, set[str]]]:
    """Lines, with the names in them, at which code goes one way or another by a name or a class."""
    found: list[tuple[int, set[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            found.append((node.lineno, names_in(node)))
        elif isinstance(node, ast.match_case):
            found.append((node.pattern.lineno, names_in(node.pattern)))
        elif isinstance(node, ast.Dict):
            found += [(key.lineno, names_in(key)) for key in node.keys if key is not None]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            found.append((node.lineno, names_in(node.args[1])))
    return found


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_outside_asks_for_a_task_by_name_or_an_encoder_by_class(path):
    for line, names in choices(ast.parse(path.read_text(encoding="utf-8"))):
        assert not names & {*TASKS, *ENCODERS}, (
            f"{path}:{line}: take what differs from the Task or the encoder"
        )


@pytest.mark.parametrize(
    "code",
    [
        "a = 1 if job.model.task == 'causal-lm' else 2",
        "if task in ('text-classification', 'image-classification'): pass",
        "match task:\n    case 'causal-lm': pass",
        "a = {'causal-lm': 1}[task]",
        "a = isinstance(x, ImageEncoder)",
        "a = isinstance(x, (int, text.TextEncoder))",
    ],
)
def test_such_code_is_seen(code):
    assert any(names & {*TASKS, *ENCODERS} for _, names in choices(ast.parse(code)))


@pytest.fixture(params=TASKS.values(), ids=TASKS)
def task(request):
    return request.param


@pytest.fixture
def encoder(task, minilm_folder):
    return {TEXTS: TextEncoder.from_folder(minilm_folder, 16), IMAGES: ImageEncoder(8)}[task.inputs]


def drawn(task, encoder):
    """Logits, a batch of made-up examples, their labels, and the encoded examples."""
    rng = np.random.default_rng(0)
    encoded = encoder.made_up(LENGTHS, rng)
    encoded = [{k: v % CLASSES if k == "input_ids" else v for k, v in one.items()} for one in encoded]
    batch = encoder.collate(encoded)
    labels = rng.integers(0, CLASSES, len(LENGTHS))
    shape = task.targets(batch, labels).rows.shape
    return rng.standard_normal((*shape, CLASSES)).astype(np.float32), batch, labels, encoded


def in_torch(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_a_task_is_found_by_its_name_and_a_job_can_name_it(task):
    assert task_named(task.name) is task
    assert ModelSection(task=task.name).task == task.name


def test_an_unknown_name_is_refused():
    with pytest.raises(ContractError, match="task = 'sorting': is not known; use one of text-classification"):
        task_named("sorting")


def test_the_loss_in_numpy_is_the_loss_in_torch(task, encoder):
    logits, batch, labels, _ = drawn(task, encoder)
    there = LOSSES[task.targets].by_example(
        torch.from_numpy(logits), in_torch(batch), torch.from_numpy(labels)
    )
    here = task.scores(logits, batch, labels)
    np.testing.assert_allclose(here, torch.stack(there, 1).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(task.totals(logits, batch, labels), here.sum(0), rtol=1e-12)


def test_a_loss_of_one_row_is_that_of_a_batch(task, encoder):
    if (packed := LOSSES[task.targets].packed) is None:
        assert task.has_head
        return
    logits, batch, labels, encoded = drawn(task, encoder)
    order = np.argsort(LENGTHS, kind="stable")
    lengths = np.array(LENGTHS)[order]
    row = np.concatenate([logits[i, : LENGTHS[i]] for i in order])
    ids = np.concatenate([encoded[i]["input_ids"] for i in order])
    starts = np.cumsum(lengths) - lengths
    found = packed(torch.from_numpy(row), torch.from_numpy(ids), torch.from_numpy(starts), lengths)
    want = task.scores(logits, batch, labels)[order]
    np.testing.assert_allclose(torch.stack(found, 1).numpy(), want, rtol=1e-5, atol=1e-5)


def test_the_predictions_of_lengths_are_those_that_the_loss_counts(task, encoder):
    logits, batch, labels, _ = drawn(task, encoder)
    assert task.predictions(np.array(LENGTHS)).tolist() == task.scores(logits, batch, labels)[:, 2].tolist()
    assert all(task.predictions(np.array([n]))[0] <= task.most_predictions(n) for n in range(1, 20))


def test_the_last_prediction_answers_for_an_example(task, encoder):
    logits, batch, labels, _ = drawn(task, encoder)
    rows = task.targets(batch, labels).rows
    last = [np.flatnonzero(row)[-1] if rows.ndim > 1 else ... for row in rows]
    np.testing.assert_array_equal(task.last(logits, batch), [x[place] for x, place in zip(logits, last)])


def test_made_up_examples_fit_the_encoder_and_the_axes_of_a_graph(task, encoder):
    rng = np.random.default_rng(0)
    one, other = (encoder.collate(encoder.made_up(lengths, rng)) for lengths in ((4, 3), (6, 2, 5)))
    for name in one:
        differ = [axis for axis, (a, b) in enumerate(zip(one[name].shape, other[name].shape)) if a != b]
        assert differ == list(range(len(task.inputs.axes)))
    rows = task.inputs.rows(np.array(LENGTHS))
    assert rows.tolist() == (list(LENGTHS) if task.inputs.has_length else [1] * len(LENGTHS))
    assert len(encoder.sides(LENGTHS)) == len(LENGTHS)


def test_a_caller_may_bring_a_loss_of_his_own(task, encoder):
    def halved(logits, classes):
        loss, correct = cross_entropy(logits, classes)
        return Right(loss / 2, correct)

    def torch_halved(logits, batch, labels):
        loss, correct, count = LOSSES[task.targets].by_example(logits, batch, labels)
        return loss / 2, correct, count

    own = replace(task, name="own", loss=halved)
    model = TunableModel(torch.nn.Identity(), own, None, losses=Loss(torch_halved))
    logits, batch, labels, _ = drawn(own, encoder)
    there = model.loss(torch.from_numpy(logits), in_torch(batch), torch.from_numpy(labels))
    here = own.scores(logits, batch, labels)
    np.testing.assert_allclose(here, torch.stack(there, 1).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(2 * here[:, 0], task.scores(logits, batch, labels)[:, 0])
