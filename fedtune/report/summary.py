"""The shape of summary.json, which a run writes and the reports read.

Numbers that were not measured are null, and so is a loss that is not a number (then `evaluated` or `clients`
says that it was measured). Bytes are those of serialised messages. Accuracies lie between 0 and 1; for a
causal-lm, accuracy is that of the next token.
"""

import json
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from fedtune.errors import RunError
from fedtune.report.privacy import Privacy
from fedtune.tasks import TaskName

FILE = "summary.json"
LISTED = 1000
"""Most clients that one list of a summary names.

Of more it names so many, chosen evenly, beside figures of all.
"""


class Base(TypedDict):
    """The frozen model."""

    source: str
    sha256: str
    parameters: int
    licence: str


class Adapter(TypedDict):
    """What was trained. `trainable` counts every trained number, `head` those of them in the task head."""

    method: str
    rank: int
    init: str
    trainable: int
    head: int
    modules: int


class SplitClient(TypedDict):
    """What one client holds; `natural` is the value of the dividing column ("" without one),
    `labels` examples per label.
    """

    name: str
    natural: str | None
    train: int
    held_out: int
    labels: list[int]


class Population(TypedDict):
    """All clients, where `split` lists only some: examples of each side and per label,
    and at `quantiles` a client's examples.

    `sha256` is that of who holds what.
    """

    clients: int
    train: int
    held_out: int
    labels: list[int]
    quantiles: list[float]
    train_quantiles: list[int]
    held_out_quantiles: list[int]
    sha256: str


class Round(TypedDict):
    """One round; round 0 is the model before training.

    `up` and `down` are of this round, `total_bytes` runs on.

    With device classes there are the simulated seconds of the round, and those up to its end
    (`simulated_clock`), the clients that never answered (`dropped`) and those that would have needed longer
    than the deadline (`stragglers`). Where not all clients train all, `units` says how many of `clients`
    trained each and `ranks` how many had each rank, and `scores`, of a round that began with a probe, what it
    said of each block: means of shares that sum to 1; `unprobed` are the clients whose answer is missing or
    was not taken, and why. Where clients keep a part of the model or a model of their own,
    `personal_accuracy` and `personal_loss` are of those that have one, `personal_clients`, with what each
    has, on `personal_evaluated` examples of theirs.
    """

    round: int
    train_loss: float | None
    loss: float | None
    accuracy: float | None
    evaluated: int
    up: int
    down: int
    total_bytes: int
    seconds: float
    clients: list[str]
    refused: dict[str, str]
    simulated_seconds: NotRequired[float]
    simulated_clock: NotRequired[float]
    dropped: NotRequired[list[str]]
    stragglers: NotRequired[list[str]]
    units: NotRequired[dict[str, int]]
    ranks: NotRequired[dict[str, int]]
    scores: NotRequired[dict[str, float]]
    unprobed: NotRequired[dict[str, str]]
    personal_accuracy: NotRequired[float | None]
    personal_loss: NotRequired[float | None]
    personal_evaluated: NotRequired[int]
    personal_clients: NotRequired[int]


class ClientScore(TypedDict):
    """One client's held-out result."""

    name: str
    accuracy: float | None
    loss: NotRequired[float | None]
    examples: int


class Measured(TypedDict):
    """All clients with a result, where `clients` lists only some, evenly from worst to best: how many, their
    held-out examples, and those of the worst tenth.
    """

    clients: int
    examples: int
    worst_examples: int


class Final(TypedDict):
    """The last evaluation, over all held-out data; `mean` and `worst_tenth` are over clients."""

    accuracy: float | None
    loss: float | None
    mean: float | None
    worst_tenth: float | None
    clients: list[ClientScore]
    whole: NotRequired[Measured]


class Personal(TypedDict):
    """What clients predict with on their own at the end: over the held-out `examples` of the `clients`, of
    all `of`, that have such a model. `federated`: accuracy of the global model on the same examples.
    """

    accuracy: float | None
    loss: float | None
    federated: float | None
    worst_tenth: float | None
    clients: int
    of: int
    examples: int


class LabelScore(TypedDict):
    """One label: training examples of all clients, held-out ones, the share of these that is given it;
    `personal`: by what clients predict with, over those that keep something.
    """

    label: str
    train: int
    examples: int
    accuracy: float | None
    personal: NotRequired[float | None]


class Majority(TypedDict):
    """Always answering the most common training label."""

    accuracy: float


class Against(TypedDict):
    """All clients, where `clients` lists only some: on how many of `clients` the federated model is better or
    equal, and the baseline's worst tenth.
    """

    clients: int
    better: int
    equal: int
    worst_tenth: float | None


class Head(TypedDict):
    """The frozen base with a head trained on everybody's pooled data."""

    accuracy: float
    loss: NotRequired[float | None]
    clients: list[ClientScore]
    whole: NotRequired[Against]


class LocalClient(TypedDict):
    """A client that trained alone, beside the federated model on the same held-out data."""

    name: str
    accuracy: float | None
    federated: float | None
    examples: int


class Local(TypedDict):
    """Clients that trained alone: `trained` (without it, all in `clients`) of the `of` in the run; both
    accuracies are over them.
    """

    clients: list[LocalClient]
    accuracy: float
    federated: float
    of: int
    trained: NotRequired[int]


class Baselines(TypedDict, total=False):
    majority: Majority
    head: Head
    local: Local


class ClientTraffic(TypedDict):
    """Bytes one client sent (`up`) and received (`down`), and the rounds it took part in."""

    name: str
    up: int
    down: int
    rounds: int


class Communication(TypedDict):
    """All that was sent.

    `sent_numbers`: of an update of all that is trained, where they are not those. `update_bytes` is the
    largest update that a client sends. `frame_bytes` is the frozen frame, which each client receives
    once; it is part of `down`.

    `evaluation` and `offers` come on top in live runs: evaluation both ways, and job offers and bundles
    without the frame. `probes` is what of `up` and `down` probes took. `took_part` counts the clients of all
    rounds where `clients` lists only some, evenly from least to most bytes.
    """

    trainable_numbers: int
    sent_numbers: NotRequired[int]
    update_bytes: int
    frame_bytes: int
    up: int
    down: int
    messages: int
    evaluation: NotRequired[int]
    offers: NotRequired[int]
    probes: NotRequired[int]
    clients: list[ClientTraffic]
    took_part: NotRequired[int]


class DeviceClass(TypedDict):
    """One class of simulated devices over the whole run.

    `clients` belong to it, of which `able` have the memory to train; `available` adds up those that
    could be drawn, over the rounds. Of the clients `asked`, some `dropped` out, some were `stragglers`
    past the deadline; the answers of the others took `seconds` together, and those `used` were averaged.
    `up` and `down` are bytes.
    """

    name: str
    clients: int
    able: int
    available: int
    asked: int
    used: int
    dropped: int
    stragglers: int
    seconds: float
    up: int
    down: int


class Trained(TypedDict):
    """How often a unit was trained: rounds in which any client did whose update was used, and those
    updates together; and its score at the last probe.
    """

    name: str
    rounds: int
    updates: int
    score: NotRequired[float]


class Ranked(TypedDict):
    """How often clients of a rank trained, as of `Trained`; `numbers` is how many
    trained numbers they have.
    """

    rank: int
    numbers: int
    rounds: int
    updates: int


class Exported(TypedDict, total=False):
    """One exported file and how it compares with the trained model on `examples` of
    the `of` held-out examples.

    `note` alone says why a file was left out.
    """

    file: str
    bytes: int
    max_difference: float | None
    label_agreement: float | None
    examples: int
    of: int
    note: str
    accuracy: float | None


class Summary(TypedDict):
    """All of summary.json. An unfinished run may lack `final`, `baselines` and `export`."""

    title: str
    created: str
    versions: dict[str, str]
    job: dict[str, dict[str, Any]]
    engine: str
    base: Base
    task: TaskName
    adapter: Adapter
    labels: list[str]
    metric: str
    split: list[SplitClient]
    population: NotRequired[Population]
    rounds: list[Round]
    final: NotRequired[Final]
    personal: NotRequired[Personal]
    by_label: NotRequired[list[LabelScore]]
    baselines: NotRequired[Baselines]
    communication: Communication
    devices: NotRequired[list[DeviceClass]]
    units: NotRequired[list[Trained]]
    ranks: NotRequired[list[Ranked]]
    export: NotRequired[dict[str, Exported]]
    privacy: Privacy
    complete: bool
    wall_seconds: float


def few(count: int, most: int = LISTED) -> list[int]:
    """Places of those of `count` that are listed: all, or `most` of them, evenly spaced,
    the first and the last among them.
    """
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def load_summary(path: Path) -> Summary:
    """Reads and checks a summary.json, or the one in a run folder.

    Raises:
        RunError: one line, for a file that is missing, unreadable, not JSON, or without what a report needs.
    """
    file = path / FILE if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = (
            "the run has not come that far, or this is not a run folder"
            if path.is_dir()
            else "give a run folder or its summary.json"
        )
        raise RunError(f"{file}: does not exist; {remedy}") from None
    except OSError as e:
        raise RunError(f"{file}: cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise RunError(f"{file}: not JSON ({str(e).splitlines()[0]}); restore it or run again") from None
    return check(raw, str(file))


def is_whole(run: Path) -> bool:
    """Whether the run in this folder came to its end, with its summary written and its exports made."""
    if not (run / "summary.json").exists():
        return False
    summary = load_summary(run)
    return summary["complete"] and "export" in summary


def check(raw: Any, source: str = FILE) -> Summary:
    """Checks parsed JSON against `Summary`; keys that this version does not know are left out.

    Raises RunError.
    """
    try:
        return _ADAPTER.validate_python(raw)
    except ValidationError as e:
        first, more = e.errors()[0], e.error_count() - 1
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        others = f" (and {more} more)" if more else ""
        raise RunError(
            f"{source}: {where}: {first['msg'].lower()}{others}; "
            "was it written by another version of fedtune?"
        ) from None


_ADAPTER: TypeAdapter[Summary] = TypeAdapter(Summary)
