"""Examples: what a client trains on, and reading them from the job's `[data]` section.

Everything is checked before anything is trained: a bad row stops the job with the
row's number and what to do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune import packages
from fedtune.common import seeds
from fedtune.data import images, tables, vader
from fedtune.data.tables import Table
from fedtune.errors import DataError
from fedtune.job import DataSection, ModelSection, toml_value
from fedtune.tasks import Inputs, Task, task_named
from fedtune.tasks.images import IMAGE_CLASSIFICATION, IMAGES
from fedtune.tasks.texts import TEXT_CLASSIFICATION, TEXTS

PACKAGE_READERS: Mapping[str, Callable[[Path], Table]] = {"vader-icwsm-2014": vader.read}
"""Fetched data packages that can be read, by name."""

OWN = "own:data"
"""What data.source says of data that Python passed."""
_DEFAULT_GROUP = DataSection.model_fields["group"].default
_FOLDER = "folder"  # data.by of a folder of images whose upper folders are domains
_SHOWN = 12  # labels listed in an error


@dataclass(frozen=True)
class Examples:
    """n examples, column by column.

    Attributes:
        inputs: texts, or paths of image files.
        labels: int64 [n], places in the data set's label names; zeros where the task has no labels.
        ids: what names each row; unique.
        natural: value of the job's `by` column, or () without one.
        groups: value of the job's `group` column, or (); rows of one group must never be parted.
    """

    inputs: tuple[str, ...]
    labels: np.ndarray
    ids: tuple[str, ...]
    natural: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """The examples at these places, in this order."""
        places = np.asarray(indices, dtype=np.int64)
        inputs, ids, natural, groups = (
            _pick(values, places) for values in (self.inputs, self.ids, self.natural, self.groups)
        )
        return Examples(inputs, self.labels[places], ids, natural, groups)


@dataclass(frozen=True)
class Dataset:
    """Examples with the names of their labels, () where the task has none."""

    examples: Examples
    label_names: tuple[str, ...]
    source: str


def load_dataset(data: DataSection, model: ModelSection, seed: int) -> Dataset:
    """Reads and checks what the job's `[data]` names: a package, a file of rows, or a folder of images.

    With `limit`, rows are drawn by the seed and keep their order; labels are those of the whole source.

    Raises:
        DataError: one line with the place, what was found, and what to do.
        UserError: an unknown package, or one that was not fetched.
    """
    if data.source == OWN:
        raise DataError(
            'data.source = "own:data": was passed from Python; pass it again: '
            "fedtune.simulate(job, out=…, data=…)"
        )
    task = task_named(model.task)
    return _READERS[task.inputs](data, task, seed)


def _pick(values: tuple[str, ...], places: np.ndarray) -> tuple[str, ...]:
    return tuple(values[place] for place in places.tolist()) if values else ()


def _open_table(data: DataSection) -> Table:
    scheme, colon, name = data.source.partition(":")
    if colon and scheme == "package":
        return _package_reader(name)(packages.find(name))
    path = Path(data.source).expanduser()
    if path.is_dir():
        raise DataError(
            f"{path}: is a folder; give a file of texts, or set model.task = "
            f"{toml_value(IMAGE_CLASSIFICATION.name)}"
        )
    wanted = {data.text, data.label, data.id, data.by, data.group} - {""}
    return tables.read_table(path, sorted(wanted))


def _package_reader(name: str) -> Callable[[Path], Table]:
    if packages.lookup(name).kind != "data" or name not in PACKAGE_READERS:
        raise DataError(
            f"data.source = package:{name}: holds no data; packages with data: {', '.join(PACKAGE_READERS)}"
        )
    return PACKAGE_READERS[name]


def _load_texts(data: DataSection, task: Task, seed: int) -> Dataset:
    table = _open_table(data)
    inputs = tables.column(table, data.text, "data.text")
    _filled(inputs, f"{table.source}: text", "remove the row or fill it")
    found = tables.column(table, data.label, "data.label") if task.has_head else []
    names = _label_names(found, data.labels, table.source) if task.has_head else ()
    examples = Examples(
        inputs=tuple(inputs),
        labels=_label_places(found, names, table.source)
        if task.has_head
        else np.zeros(table.rows, dtype=np.int64),
        ids=_ids(table, data.id),
        natural=_natural(table, data),
        groups=_groups(table, data.group),
    )
    return Dataset(examples.take(_drawn(len(examples), data.limit, seed)), names, data.source)


def _load_images(data: DataSection, task: Task, seed: int) -> Dataset:
    root = _image_root(data, task)
    found = images.list_images(root, data.by == _FOLDER)
    names = _label_names([image.label for image in found], data.labels, str(root))
    kept = [found[place] for place in _drawn(len(found), data.limit, seed)]
    for image in kept:
        images.check_image(image.path)
    examples = Examples(
        inputs=tuple(str(image.path) for image in kept),
        labels=_image_labels(kept, names),
        ids=tuple(image.path.relative_to(root).as_posix() for image in kept),
        natural=tuple(image.domain for image in kept) if data.by == _FOLDER else (),
    )
    return Dataset(examples, names, data.source)


_READERS: Mapping[Inputs, Callable[[DataSection, Task, int], Dataset]] = {
    TEXTS: _load_texts,
    IMAGES: _load_images,
}


def _image_root(data: DataSection, task: Task) -> Path:
    if data.source.startswith("package:"):
        raise DataError(
            f"data.source = {data.source}: holds texts; give a folder of images, "
            f"or set model.task = {toml_value(TEXT_CLASSIFICATION.name)}"
        )
    root = Path(data.source).expanduser()
    if not root.exists():
        raise DataError(f"{root}: does not exist; check data.source")
    if not root.is_dir():
        raise DataError(
            f"{root}: is a file; {task.name} reads a folder of images with one sub-folder per label"
        )
    if data.partition == "natural" and data.by != _FOLDER:
        remedy = f'set data.by = "folder" for {root}/DOMAIN/LABEL/FILE, or data.partition = "iid"'
        raise DataError(f"data.by = {data.by!r}: images have no columns; {remedy}")
    if data.group not in ("", _DEFAULT_GROUP):
        raise DataError(f'data.group = {data.group!r}: images have no columns; set data.group = ""')
    return root


def _drawn(rows: int, limit: int, seed: int) -> np.ndarray:
    """Places of the rows kept, ascending int64."""
    if limit == 0 or limit >= rows:
        return np.arange(rows, dtype=np.int64)
    return np.sort(seeds.generator(seed, "limit").choice(rows, size=limit, replace=False)).astype(np.int64)


def _filled(values: Sequence[str], what: str, remedy: str) -> None:
    for row, value in enumerate(values, 1):
        if not value.strip():
            raise DataError(f"{what} of row {row} is empty; {remedy}")


def _label_names(found: Sequence[str], given: tuple[str, ...], source: str) -> tuple[str, ...]:
    """The job's labels, or those found: numbers by value, otherwise by name."""
    _filled(found, f"{source}: label", "remove the row or fill it")
    names = given or _sorted(set(found))
    if len(names) < 2:
        raise DataError(
            f"{source}: {len(names)} label ({', '.join(names)}), a classifier needs at least 2; "
            "name them all in data.labels"
        )
    return names


def _sorted(values: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(values, key=lambda value: (int(value), value)))
    except ValueError:
        return tuple(sorted(values))


def _label_places(found: Sequence[str], names: tuple[str, ...], source: str) -> np.ndarray:
    """int64 [n]. Raises DataError at the first label that is not one of `names`."""
    places = {name: place for place, name in enumerate(names)}
    for row, value in enumerate(found, 1):
        if value not in places:
            raise DataError(
                f"{source}: label {value!r} of row {row} is not in data.labels ({_list(names)}); "
                "add it there or mend the row"
            )
    return np.array([places[value] for value in found], dtype=np.int64)


def _image_labels(kept: Sequence[images.ImageFile], names: tuple[str, ...]) -> np.ndarray:
    places = {name: place for place, name in enumerate(names)}
    for image in kept:
        if image.label not in places:
            known = f"data.labels ({_list(names)})"
            raise DataError(
                f"{image.path}: label folder {image.label!r} is not in {known}; "
                "add it there or rename the folder"
            )
    return np.array([places[image.label] for image in kept], dtype=np.int64)


def _list(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _ids(table: Table, name: str) -> tuple[str, ...]:
    """The job's id column, checked for doubles; without one, the row numbers from 1."""
    if not name:
        return tuple(str(row) for row in range(1, table.rows + 1))
    values = tables.column(table, name, "data.id")
    _filled(values, f"{table.source}: id", 'fill it, or set data.id = "" to number the rows')
    seen: dict[str, int] = {}
    for row, value in enumerate(values, 1):
        if value in seen:
            raise DataError(
                f"{table.source}: id {value!r} stands in rows {seen[value]} and {row}; "
                "ids must differ, remove one of them"
            )
        seen[value] = row
    return tuple(values)


def _natural(table: Table, data: DataSection) -> tuple[str, ...]:
    if data.partition != "natural":
        return tuple(tables.column(table, data.by, "data.by")) if data.by in table.columns else ()
    values = tables.column(table, data.by, "data.by", 'or set data.partition = "iid"')
    _filled(values, f"{table.source}: {data.by}", 'fill it, or set data.partition = "iid"')
    return tuple(values)


def _groups(table: Table, name: str) -> tuple[str, ...]:
    """The job's group column. The default one may be absent: then rows stand alone."""
    if not name or (name == _DEFAULT_GROUP and name not in table.columns):
        return ()
    values = tables.column(table, name, "data.group", 'or set data.group = ""')
    _filled(values, f"{table.source}: {name}", 'fill it, or set data.group = "" to let rows stand alone')
    return tuple(values)
