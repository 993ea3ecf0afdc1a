"""What keys of different sections must agree on: a line for each that do not,
with value, limit and remedy.
"""

from collections.abc import Iterable, Iterator, Mapping

from fedtune.adapters.kinds.table import BIASES_ONLY, HEAD_ONLY, WITH_CORES, WITH_GRADIENT_FRAME
from fedtune.aggregation.rules import MEAN, RULES, Rule
from fedtune.aggregation.steps import AVERAGE, STEPS, Step
from fedtune.job.private import privacy_disagreements
from fedtune.job.sections import EdgeSection, Section, Sections, tables
from fedtune.job.text import CONTROL, or_, toml_value
from fedtune.tasks import task_named
from fedtune.units.strategies import STRATEGIES


def disagreements(job: Sections, rule: Rule | None = None) -> Iterator[str]:
    """rule: in place of the job's."""
    data, fed, adapter = job.data, job.federation, job.adapter
    rule = rule or RULES[fed.aggregation]
    if data.partition != "natural" and data.clients == 0:
        yield (
            'data.clients = 0: only partition = "natural" can count clients itself; '
            f"give a number of at least 1 for {toml_value(data.partition)}"
        )
    if data.partition == "natural" and not data.by:
        yield (
            'data.by = "": partition = "natural" needs the column that divides '
            'the data; name one or choose "iid"'
        )
    if data.partition == "dirichlet" and data.alpha == 0:
        yield (
            'data.alpha = 0: partition = "dirichlet" needs a concentration above 0; '
            "0.1 is very uneven, 100 nearly even"
        )
    if data.clients and fed.cohort > data.clients:
        yield f"federation.cohort = {fed.cohort}: at most data.clients = {data.clients}; lower it"
    if fed.sampling == "fixed" and fed.min_replies > fed.cohort:
        yield (
            f"federation.min-replies = {fed.min_replies}: at most federation.cohort = {fed.cohort}; lower it"
        )
    if len(set(data.labels)) != len(data.labels):
        yield f"data.labels = {toml_value(data.labels)}: a label stands twice; name each once"
    if len(set(job.evaluation.baselines)) != len(job.evaluation.baselines):
        yield (
            f"evaluation.baselines = {toml_value(job.evaluation.baselines)}: a baseline "
            "stands twice; name each once"
        )
    yield from _rule_disagreements(job, rule)
    yield from _idle("federation", fed, "server_optimizer", _users(STEPS.values()))
    if fed.momentum and fed.optimizer != "sgd":
        yield (
            f'federation.momentum = {fed.momentum}: only used by optimizer = "sgd"; '
            f"remove it or change the optimizer from {toml_value(fed.optimizer)}"
        )
    if not task_named(job.model.task).has_head and adapter.method in HEAD_ONLY:
        yield (
            f"adapter.method = {toml_value(adapter.method)}: a {job.model.task} has no task head; "
            "use fed-sb, lora, bias or full"
        )
    if adapter.asks_gradients and adapter.method not in WITH_GRADIENT_FRAME:
        yield (
            f"adapter.init = {toml_value(adapter.init)}: only for method = {or_(WITH_GRADIENT_FRAME)}, "
            f'not {toml_value(adapter.method)}; use init = "weights"'
        )
    if not adapter.targets:
        yield (
            "adapter.targets = []: names no linear, so nothing would be adapted; "
            'use ["all-linear"] or name some'
        )
    if adapter.method in HEAD_ONLY and not adapter.train_head:
        yield (
            f"adapter.train-head = false: method = {toml_value(adapter.method)} trains nothing but the head; "
            "set it to true or choose another method"
        )
    yield from _forward_disagreements(job)
    yield from _units_disagreements(job, rule)
    yield from _rank_disagreements(job, rule)
    yield from _overshooting(job)
    yield from _drift_disagreements(job, rule)
    yield from _personal_disagreements(job, rule)
    yield from privacy_disagreements(job)
    named = [device.name for device in job.simulation.devices]
    for place, name in enumerate(named):
        if name in named[:place]:
            yield (
                f"simulation.devices.{place}.name = {toml_value(name)}: stands twice; "
                "give each class its own name"
            )
    for where, section in named_sections(job):
        for key, value in section:
            texts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(text, str) and CONTROL.search(text) for text in texts):
                yield (
                    f"{where}.{key.replace('_', '-')} = {toml_value(value)}: "
                    "holds a control character; remove it"
                )


def _idle(name: str, section: Section, choice: str, keys: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Keys of the section that were changed although its choice is none of those they are for."""
    unchanged = type(section)()
    for key, choices in keys.items():
        if getattr(section, key) != getattr(unchanged, key) and getattr(section, choice) not in choices:
            yield (
                f"{name}.{key.replace('_', '-')} = {getattr(section, key)}: "
                f"only for {choice.replace('_', '-')} = {or_(choices)}, "
                f"not {toml_value(getattr(section, choice))}; remove it"
            )


def _users(choices: Iterable[Rule | Step]) -> dict[str, tuple[str, ...]]:
    """Of each key that is of one choice or more: their names."""
    found = dict[str, tuple[str, ...]]()
    for choice in choices:
        for key in choice.keys:
            found[key] = (*found.get(key, ()), choice.name)
    return found


def _rule_disagreements(job: Sections, rule: Rule) -> Iterator[str]:
    fed, chosen = job.federation, f"aggregation = {toml_value(rule.name)}"
    yield from _idle("federation", fed, "aggregation", _users(RULES.values()))
    for key in rule.keys:
        if not getattr(fed, key):
            yield f"federation.{key.replace('_', '-')} = 0: {chosen} needs it; set it above 0"
    yield from rule.problems(fed)
    if not rule.sums and job.privacy.secure_aggregation:
        yield (
            f'federation.{chosen}: looks at single updates, which secure-aggregation hides; use "{MEAN.name}"'
        )
    if not rule.sums and job.privacy.unit == "client":
        yield f'federation.{chosen}: noise for whole clients is sized for a mean; use "{MEAN.name}"'


def _forward_disagreements(job: Sections) -> Iterator[str]:
    edge, fed, default = job.edge, job.federation, EdgeSection()
    if edge.mode != "forward":
        for name in ("directions", "perturbation", "share"):
            if getattr(edge, name) != getattr(default, name):
                yield (
                    f"edge.{name} = {toml_value(getattr(edge, name))}: only for "
                    'edge.mode = "forward"; remove it'
                )
        return
    if fed.optimizer != "sgd" or fed.momentum or fed.weight_decay or fed.head_lr or fed.proximal:
        found = ", ".join(
            f"{name.replace('_', '-')} = {toml_value(getattr(fed, name))}"
            for name in ("optimizer", "momentum", "weight_decay", "head_lr", "proximal")
        )
        yield (
            f'edge.mode = "forward": steps are of sgd with one learning rate, and {found}; '
            'set federation.optimizer = "sgd" and the others to 0'
        )
    if job.adapter.asks_gradients:
        yield (
            'edge.mode = "forward": devices compute no gradients, and adapter.init = '
            f'{toml_value(job.adapter.init)} asks for them; use "weights"'
        )
    if job.privacy.unit == "example":
        yield (
            'edge.mode = "forward": bounds no single example\'s part of a step; '
            'use privacy.unit = "client" or "none", or edge.mode = "backward"'
        )


def _drift_disagreements(job: Sections, rule: Rule) -> Iterator[str]:
    fed, chosen = job.federation, f"federation.drift = {toml_value(job.federation.drift)}"
    yield from _idle("federation", fed, "drift", {"ascent": ("fedspeed",)})
    if fed.drift == "none":
        return
    if job.personal.method != "none":
        yield (
            f"{chosen}: is not known to work with personal.method = {toml_value(job.personal.method)}; "
            'set one of the two to "none"'
        )
    if fed.optimizer != "sgd" or fed.momentum:
        yield (
            f"{chosen}: is made for plain SGD, and optimizer = {toml_value(fed.optimizer)}, "
            f'momentum = {fed.momentum}; set federation.optimizer = "sgd" and momentum = 0'
        )
    if fed.server_optimizer != AVERAGE.name or not rule.sums:
        found = (
            f"server-optimizer = {toml_value(fed.server_optimizer)}, aggregation = {toml_value(rule.name)}"
        )
        yield f'{chosen}: the coordinator takes the mean, and {found}; set them to "average" and "mean"'
    if fed.drift == "scaffold" and fed.proximal:
        yield (
            f"federation.proximal = {fed.proximal:g}: SCAFFOLD reads a client's gradients off its way, "
            "to which a pull adds; set it to 0"
        )
    if fed.drift == "scaffold" and fed.weighting != "equal":
        yield (
            f"federation.weighting = {toml_value(fed.weighting)}: SCAFFOLD's controls count all "
            'clients alike; set it to "equal"'
        )
    if fed.drift == "fedspeed" and not fed.proximal:
        yield (
            'federation.proximal = 0: drift = "fedspeed" needs the strength of its '
            "pull; give it, 0.1 for a start"
        )
    yield from _stateful_disagreements(job, chosen)


def _personal_disagreements(job: Sections, rule: Rule) -> Iterator[str]:
    personal, chosen = job.personal, f"personal.method = {toml_value(job.personal.method)}"
    yield from _idle(
        "personal",
        personal,
        "method",
        {"strength": ("ditto",), **dict.fromkeys(("every", "share", "most"), ("select",))},
    )
    if personal.method == "none":
        return
    heads = personal.method in ("head", "loge")
    if heads and not task_named(job.model.task).has_head:
        yield f'{chosen}: a {job.model.task} has no task head; use "ditto"'
    elif heads and not job.adapter.train_head:
        yield f"adapter.train-head = false: {chosen} is a head that each client trains; set it to true"
    elif heads and job.adapter.method in HEAD_ONLY:
        left = "to send" if personal.method == "head" else "to learn against the fixed head"
        yield (
            f"adapter.method = {toml_value(job.adapter.method)}: with {chosen} nothing would be left {left}; "
            "choose another adapter"
        )
    if personal.method == "select":
        yield from _select_disagreements(job, rule, chosen)
    yield from _stateful_disagreements(job, chosen)


def _select_disagreements(job: Sections, rule: Rule, chosen: str) -> Iterator[str]:
    fed = job.federation
    if fed.server_optimizer != AVERAGE.name or not rule.sums:
        found = (
            f"server-optimizer = {toml_value(fed.server_optimizer)}, aggregation = {toml_value(rule.name)}"
        )
        yield (
            f"{chosen}: the coordinator takes the mean of each entry over the clients that do not keep it, "
            f'and {found}; set them to "average" and "mean"'
        )
    headed = task_named(job.model.task).has_head and job.adapter.train_head
    if job.adapter.method in BIASES_ONLY and not headed:
        yield (
            f"adapter.method = {toml_value(job.adapter.method)}: {chosen} leaves biases to all, "
            "so that nothing would be a client's "
            'own; choose another adapter, or "ditto"'
        )


def _overshooting(job: Sections) -> Iterator[str]:
    """Pulls that throw a step of plain SGD further beyond their aim than it was before:
    those of lr times strength from 2 on.
    """
    fed = job.federation
    rate = max(fed.lr, fed.head_lr)
    for key, strength in (
        ("federation.proximal", fed.proximal),
        ("personal.strength", job.personal.strength if job.personal.method == "ditto" else 0.0),
    ):
        if fed.optimizer == "sgd" and rate * strength >= 2:
            yield (
                f"{key} = {strength:g}: times the learning rate {rate:g} it is {rate * strength:g}, "
                "and from 2 on each step of SGD lands further away; lower one of the two"
            )


def _stateful_disagreements(job: Sections, chosen: str) -> Iterator[str]:
    """What is refused where clients keep something from round to round."""
    if job.privacy.unit != "none":
        yield (
            f"{chosen}: what clients keep is made without noise, so no epsilon covers "
            'it; set privacy.unit = "none"'
        )
    elif job.privacy.secure_aggregation:
        yield (
            f"{chosen}: was not tried under secure-aggregation, where clients' scores may not be sent "
            "either; set privacy.secure-aggregation = false"
        )
    if job.edge.mode == "forward":
        yield f'{chosen}: needs gradients in every step; use edge.mode = "backward"'
    if not job.units.chosen.whole:
        yield (
            f"{chosen}: what a client keeps is of all that is trained, and units.strategy = "
            f'{toml_value(job.units.strategy)} trains a part; use "all"'
        )


def _units_disagreements(job: Sections, rule: Rule) -> Iterator[str]:
    probing = tuple(strategy.name for strategy in STRATEGIES.values() if strategy.probes)
    units, own = (
        job.units,
        [(place, device.units) for place, device in enumerate(job.simulation.devices) if device.units],
    )
    yield from _idle(
        "units", units, "strategy", dict.fromkeys(("consistency", "probe_every", "probe_batches"), probing)
    )
    if units.fit and not any(
        device.memory_mb or (units.seconds and device.speed) for device in job.simulation.devices
    ):
        yield (
            "units.fit = true: no class of simulation.devices has memory-mb, or speed beside units.seconds, "
            "to fit blocks to; give one, or remove it"
        )
    if units.seconds and not units.fit:
        yield f"units.seconds = {units.seconds:g}: only for fit = true; remove it"
    elif units.seconds and not any(device.speed for device in job.simulation.devices):
        yield (
            f"units.seconds = {units.seconds:g}: no class of simulation.devices has a speed, "
            "so training takes no time; give one, or remove it"
        )
    if not units.probes:
        for place, device in enumerate(job.simulation.devices):
            if device.depth:
                yield (
                    f"simulation.devices.{place}.depth = {device.depth}: only for strategies that go "
                    f"by scores, not {toml_value(units.strategy)}; remove it"
                )
    if units.chosen.whole:
        if units.fit:
            yield (
                'units.fit = true: strategy = "all" trains every block; remove it, or choose another strategy'
            )
        if units.budget:
            yield (
                f'units.budget = {units.budget}: strategy = "all" trains every block; '
                "remove it, or choose another strategy"
            )
        for place, count in own:
            yield (
                f'simulation.devices.{place}.units = {count}: units.strategy = "all" trains every block; '
                "remove it, or choose another strategy"
            )
        return
    if not units.budget and not units.fit:
        yield (
            f"units.budget = 0: strategy = {toml_value(units.strategy)} needs the number of blocks that "
            "a client trains; give at least 1"
        )
    if job.adapter.method in HEAD_ONLY:
        yield (
            f"units.strategy = {toml_value(units.strategy)}: "
            f"adapter.method = {toml_value(job.adapter.method)} trains "
            'nothing in the blocks; use "all"'
        )
    if job.edge.mode == "forward":
        yield (
            f'units.strategy = {toml_value(units.strategy)}: with edge.mode = "forward" a step moves '
            'the whole model along a direction; use "all"'
        )
    score = units.chosen.score
    if score and units.probe_batches < score.fewest:
        yield (
            f"units.probe-batches = {units.probe_batches}: strategy = {toml_value(units.strategy)} compares "
            f"the gradients of batches; give at least {score.fewest}"
        )
    if units.probes:
        for place, device in enumerate(job.simulation.devices):
            count = device.units or (0 if units.fit else units.budget)
            if device.depth and count > device.depth:
                yield (
                    f"simulation.devices.{place}.depth = {device.depth}: its clients train {count} blocks; "
                    f"give at least {count}, or the class fewer units"
                )
        yield from _probe_disagreements(job, rule)
        return
    # noise is on every number, and the denominator stays
    protected = job.privacy.unit == "client" and rule.sums
    for key in [] if protected else _alike(job, rule)[:1]:
        if units.fit:
            yield f"units.fit = true: with {key} all clients must train as many blocks; remove it"
        for place, count in own:
            if count != units.budget:
                yield (
                    f"simulation.devices.{place}.units = {count}: units.budget is {units.budget}, "
                    f"and with {key} all clients must train as many blocks; remove it"
                )


def _alike(job: Sections, rule: Rule) -> list[str]:
    """What counts on it that every client trains the same: noise and denominators do, and what one client
    alone trains is seen in the sum, and is that client's.
    """
    return [
        key
        for key, holds in {
            'privacy.unit = "client"': job.privacy.unit == "client",
            "privacy.secure-aggregation = true": job.privacy.secure_aggregation,
            f"federation.aggregation = {toml_value(rule.name)}": rule.alike,
        }.items()
        if holds
    ]


def _rank_disagreements(job: Sections, rule: Rule) -> Iterator[str]:
    rank, fed = job.adapter.rank, job.federation
    alike = _alike(job, rule) + [
        key
        for key, holds in {
            f"federation.drift = {toml_value(fed.drift)}": fed.drift != "none",
            f"personal.method = {toml_value(job.personal.method)}": job.personal.method != "none",
            'edge.mode = "forward"': job.edge.mode == "forward",
        }.items()
        if holds
    ]
    for place, device in enumerate(job.simulation.devices):
        chosen = f"simulation.devices.{place}.rank = {device.rank}"
        if device.rank and job.adapter.method not in WITH_CORES:
            yield (
                f"{chosen}: adapter.method = {toml_value(job.adapter.method)} has no cores with leading "
                f"blocks; remove it, or use {or_(WITH_CORES)}"
            )
        elif device.rank > rank:
            yield (
                f"{chosen}: at most adapter.rank = {rank}, of which all classes train a leading part; "
                "lower it, or raise adapter.rank"
            )
        elif device.rank and device.rank != rank:
            for key in alike[:1]:
                yield (
                    f"{chosen}: adapter.rank is {rank}, and with {key} all clients must train "
                    "the same numbers; remove it"
                )


def _probe_disagreements(job: Sections, rule: Rule) -> Iterator[str]:
    chosen = f"units.strategy = {toml_value(job.units.strategy)}"
    if job.privacy.unit != "none" or job.privacy.secure_aggregation:
        key = (
            "privacy.secure-aggregation = true"
            if job.privacy.unit == "none"
            else f"privacy.unit = {toml_value(job.privacy.unit)}"
        )
        yield (
            f"{chosen}: scores of single clients' data would leave without protection, "
            f'so it does not go with {key}; use "lisa" or "top"'
        )
    if rule.alike:
        yield (
            f"{chosen}: clients train different blocks, whose updates federation.aggregation = "
            f'{toml_value(rule.name)} cannot compare; use "lisa" or "top"'
        )


def named_sections(job: Sections) -> Iterator[tuple[str, Section]]:
    """Every section with its name, and every table in a list of tables with its place there."""
    for name in type(job).model_fields:
        section = getattr(job, name)
        yield name, section
        for key, found in tables(section):
            yield from ((f"{name}.{key}.{place}", table) for place, table in enumerate(found))
