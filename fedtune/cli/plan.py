"""fedtune plan: what a job will cost, before it runs."""

import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from fedtune.cli.common import JobArgument, JsonOption, SetOption, UnderstandOption, out, overrides, shell
from fedtune.job import load_job
from fedtune.units.strategies import STRATEGIES

if TYPE_CHECKING:
    from fedtune.workflows.plan import DeviceTime, JobPlan

EXAMPLES = (
    "Examples:  fedtune plan   |   "
    "fedtune plan job.toml --set adapter.rank=64   |   "
    "fedtune plan --set model.source=./llama --set model.task=causal-lm --json"
)


@shell
def command(
    job: JobArgument = None,
    set_: SetOption = None,
    understand: UnderstandOption = False,
    json_: JsonOption = False,
) -> None:
    """Prints trainable numbers, bytes, memory and privacy of a job.
    Needs a base's config, not its weights.
    """
    checked = load_job(job, overrides(set_, understand))
    from fedtune.workflows.plan import make_plan

    plan = make_plan(checked)
    if json_:
        out.print_json(json.dumps(plan.to_json()))
        return
    _show(plan, out)


def _show(plan: "JobPlan", console: Console) -> None:
    from fedtune.report.format import clean, count, percent, size
    from fedtune.report.privacy import shown
    from fedtune.report.terminal import table

    device = plan.device
    rows = [
        ("base", plan.source, f"{count(plan.base_parameters)} numbers, frozen"),
        (
            "adapter",
            f"{plan.method}, rank {_ranks(plan)}" if plan.modules else plan.method,
            f"{plan.modules} linears" if plan.modules else "",
        ),
        (
            "trained",
            f"{count(plan.trainable)} numbers",
            f"{percent(plan.trainable, plan.base_parameters)} of the base, {count(plan.head)} in the head",
        ),
        *(
            [
                (
                    "a client trains",
                    f"{plan.budget} of {sum(u.selectable for u in plan.units)} blocks",
                    f"{STRATEGIES[plan.strategy].words}; what lies outside the blocks is always trained",
                )
            ]
            if not STRATEGIES[plan.strategy].whole
            else []
        ),
        (
            "one update",
            size(plan.update_bytes),
            "up, per client and round"
            + (
                ", at most"
                if plan.units and any(u.trained in ("drawn", "chosen") for u in plan.units)
                else ""
            ),
        ),
        ("one model", size(plan.model_bytes), "down, per client and round"),
        *(
            [
                (
                    "a probe",
                    size(plan.probe_bytes),
                    f"a model down and scores up, per client; {plan.probes} times in all",
                )
            ]
            if plan.probes
            else []
        ),
        ("frame", size(plan.frame_bytes), "down, once per client"),
        (
            "initialisation",
            size(plan.init_bytes),
            "gradients of the first step" if plan.init_bytes else "needs no exchange",
        ),
        ("a round", size(plan.round_bytes), f"{plan.cohort} of {plan.clients} clients"),
        (
            "in all",
            size(round(plan.total_bytes)),
            f"{plan.rounds} rounds; expects {plan.expected_first_time:.1f} clients to need the frame",
        ),
        *(
            [
                ("kept by a client", size(plan.kept_bytes), "at most, on its disk, from round to round"),
                (
                    "kept in clients/",
                    size(plan.kept_total),
                    (
                        f"at most, in a simulation, of the {plan.expected_first_time:.1f} "
                        "clients expected to take part"
                    ),
                ),
            ]
            if plan.kept_bytes
            else []
        ),
        (
            "memory of a client",
            _size(device["total"]),
            "computed from shapes; libraries and data come on top",
        ),
        ("  base", _size(device["base"]), ""),
        ("  activations", _size(device["activations"]), _kept(device)),
        ("  adapter", _size(device["adapter_gradients_optimizer"]), "with gradients and optimizer state"),
        ("  frame", _size(device["frame"]), ""),
        ("privacy", f"epsilon {shown(plan.epsilon)}", _protects(plan)),
    ]
    console.print(table(("", "figure", ""), rows, words=(0, 2)))
    if STRATEGIES[plan.strategy].whole:
        console.print(
            table(
                ("unit", "numbers", "bytes"), [(u.name, count(u.numbers), size(u.bytes)) for u in plan.units]
            )
        )
    else:
        units = [
            (u.name, count(u.numbers), size(u.bytes), "yes" if u.selectable else "no", u.trained)
            for u in plan.units
        ]
        console.print(table(("unit", "numbers", "bytes", "selectable", "trained"), units, words=(0, 3, 4)))
    if plan.devices:
        if plan.ranks or not STRATEGIES[plan.strategy].whole:
            console.print(Text("A client of each class, in a round", style="bold"))
            classes = [
                (
                    clean(d.name),
                    *((str(d.rank),) if plan.ranks else ()),
                    count(d.numbers),
                    size(d.update_bytes),
                    size(d.model_bytes),
                    _size(d.memory),
                )
                for d in plan.devices
            ]
            console.print(
                table(
                    (
                        "device class",
                        *(("rank",) if plan.ranks else ()),
                        "numbers trained",
                        "one update",
                        "one model",
                        "memory",
                    ),
                    classes,
                )
            )
        console.print(Text("A round of one client, in simulated time", style="bold"))
        header = ("device class", "clients", "receiving", "training", "sending", "in all", "frame, once")
        more = (
            *(("blocks",) if not STRATEGIES[plan.strategy].whole else ()),
            *(("of the last", "a probe") if plan.probes else ()),
        )
        console.print(table((*header, *more), [(*_device(d), *_units(d, plan)) for d in plan.devices]))
    for note in plan.notes:
        console.print(Text(f"! {note}", style="yellow"))


def _ranks(plan: "JobPlan") -> str:
    return f"{plan.rank} (clients: {', '.join(map(str, plan.ranks))})" if plan.ranks else str(plan.rank)


def _kept(device: dict[str, int | None]) -> str:
    stock, text = device["activations_without_lean"], "kept for the backward pass of one batch"
    return (
        text
        if stock is None or stock == device["activations"]
        else f"{text}; {_size(stock)} without federation.lean"
    )


def _protects(plan: "JobPlan") -> str:
    if plan.unit == "none":
        return "no differential privacy is asked for"
    return (
        f"at most, of each {plan.unit}, at delta = {plan.delta:.3g}; "
        f"noise multiplier {plan.noise_multiplier:g}"
    )


def _device(d: "DeviceTime") -> tuple[str, ...]:
    from fedtune.report.format import ABSENT, clean, count, duration

    times = [duration(seconds) for seconds in (d.down, d.train, d.up, d.seconds, d.frame)]
    return (
        clean(d.name),
        count(d.clients),
        *(times if d.able else [ABSENT, ABSENT, ABSENT, "too little memory", ABSENT]),
    )


def _units(d: "DeviceTime", plan: "JobPlan") -> tuple[str, ...]:
    from fedtune.report.format import count, duration

    return (
        *((count(d.blocks),) if not STRATEGIES[plan.strategy].whole else ()),
        *((count(d.depth), duration(d.probe) if d.probed else "not asked") if plan.probes else ()),
    )


def _size(value: int | None) -> str:
    from fedtune.report.format import size

    return "not known" if value is None else size(value)
