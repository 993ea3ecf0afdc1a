"""Which method a job's clients follow: the one place that knows them all."""

from collections.abc import Sequence

from fedtune.errors import ContractError
from fedtune.job import Job
from fedtune.stateful import ditto, fed_per, fed_speed, loge, scaffold, select
from fedtune.stateful.base import Answer, Ask, Client, Trained
from fedtune.types import Arrays
from fedtune.wire import Schema


def method_of(job: Job) -> str:
    """ "ditto", "head", "select", "loge", "scaffold" or "fedspeed";
    "" where clients keep nothing from round to round.
    """
    names = [name for name in (job.personal.method, job.federation.drift) if name != "none"]
    return names[0] if names else ""


def is_personal(job: Job) -> bool:
    """Whether clients predict with something of their own."""
    return job.personal.method != "none"


def travelling(job: Job, schema: Schema) -> Schema:
    """What models and updates hold, of the trained tensors in `schema`."""
    method = method_of(job)
    return (
        fed_per.shared(schema)
        if method == "head"
        else scaffold.with_controls(schema)
        if method == "scaffold"
        else schema
    )


def kept(job: Job, schema: Schema) -> Schema:
    """What a client keeps, of the trained tensors in `schema`."""
    return {"head": fed_per.own, "select": select.kept, "loge": loge.kept}.get(method_of(job), _same)(schema)


def gradients(job: Job) -> int:
    """Gradients that a client computes for each example that it trains on: 1, or more where a method asks
    for more than one training.
    """
    return {"ditto": 2, "select": 2, "fedspeed": 2, "loge": 3}.get(method_of(job), 1)


def copies(job: Job) -> int:
    """Arrays as large as all trained tensors that a client holds in a step beside those of a plain one."""
    return {"ditto": 2, "select": 7, "loge": 4, "scaffold": 3, "fedspeed": 4}.get(method_of(job), 0)


def asks(job: Job, client: Client) -> tuple[Ask, ...]:
    """The trainings of a client's round."""
    fed = job.federation
    match method_of(job):
        case "ditto":
            return ditto.asks(client, job.personal.strength, fed.proximal)
        case "head":
            return fed_per.asks(client, fed.proximal)
        case "select":
            return select.asks(client, fed.proximal)
        case "loge":
            return loge.asks(client, fed.seed, fed.proximal)
        case "scaffold":
            return scaffold.asks(client)
        case "fedspeed":
            return fed_speed.asks(client, fed.proximal, fed.ascent)
    raise ContractError("the job's clients keep nothing")


def answer(job: Job, schema: Schema, client: Client, trained: Sequence[Trained]) -> Answer:
    """What a client makes of them. schema: of the trained tensors."""
    match method_of(job):
        case "ditto":
            return ditto.answer(trained)
        case "head":
            return fed_per.answer(trained, schema)
        case "select":
            return select.answer(client, trained, job.personal.share, job.personal.most, job.personal.every)
        case "loge":
            return loge.answer(client, trained)
        case "scaffold":
            return scaffold.answer(client, trained)
        case "fedspeed":
            return fed_speed.answer(client, trained)
    raise ContractError("the job's clients keep nothing")


def personal(job: Job, model: Arrays, kept: Arrays) -> Arrays:
    """The trained tensors with which a client predicts, from those of the global model and what it keeps."""
    return {
        "ditto": ditto.personal,
        "head": fed_per.personal,
        "select": select.personal,
        "loge": loge.personal,
    }[job.personal.method](model, kept)


def shared(job: Job, model: Arrays) -> Arrays:
    """The model with which everybody predicts, from the one that is trained on; both as they travel."""
    return loge.realigned(model) if method_of(job) == "loge" else model


def _same(schema: Schema) -> Schema:
    return schema
