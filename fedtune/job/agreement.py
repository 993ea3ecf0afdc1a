"""What keys of different sections must agree on: a line for each that do not,
with value, limit and remedy.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

from fedtune.adapters.kinds.table import BIASES_ONLY, HEAD_ONLY, WITH_CORES, WITH_GRADIENT_FRAME
from fedtune.aggregation.rules import MEAN, RULES, Rule
from fedtune.aggregation.steps import AVERAGE, STEPS, Step
from fedtune.job.checks import Check, idle, of_each_class, problems, when
from fedtune.job.private import PRIVACY_CHECKS
from fedtune.job.sections import DeviceClass, EdgeSection, Section, Sections, tables
from fedtune.job.text import CONTROL, or_, toml_value
from fedtune.tasks import task_named
from fedtune.units.strategies import STRATEGIES

RuleOf = Callable[[Sections], Rule]
"""The aggregation rule of a job."""


def disagreements(job: Sections, rule: Rule | None = None) -> Iterator[str]:
    """All lines; none of a check that needs a key which the job lacks.

    rule: in place of the job's.
    """
    return problems(_checks(lambda job: rule) if rule else CHECKS, job)


def _uncounted_clients(job: Sections) -> Iterator[str]:
    if job.data.partition != "natural" and job.data.clients == 0:
        yield (
            'data.clients = 0: only partition = "natural" can count clients itself; '
            f"give a number of at least 1 for {toml_value(job.data.partition)}"
        )


def _no_column(job: Sections) -> Iterator[str]:
    if job.data.partition == "natural" and not job.data.by:
        yield (
            'data.by = "": partition = "natural" needs the column that divides '
            'the data; name one or choose "iid"'
        )


def _no_concentration(job: Sections) -> Iterator[str]:
    if job.data.partition == "dirichlet" and job.data.alpha == 0:
        yield (
            'data.alpha = 0: partition = "dirichlet" needs a concentration above 0; '
            "0.1 is very uneven, 100 nearly even"
        )


def _cohort_of_more_than_all(job: Sections) -> Iterator[str]:
    fed, data = job.federation, job.data
    if data.clients and fed.cohort > data.clients:
        yield f"federation.cohort = {fed.cohort}: at most data.clients = {data.clients}; lower it"


def _more_replies_than_asked(job: Sections) -> Iterator[str]:
    fed = job.federation
    if fed.sampling == "fixed" and fed.min_replies > fed.cohort:
        yield (
            f"federation.min-replies = {fed.min_replies}: at most federation.cohort = {fed.cohort}; lower it"
        )


def _label_twice(job: Sections) -> Iterator[str]:
    labels = job.data.labels
    if len(set(labels)) != len(labels):
        yield f"data.labels = {toml_value(labels)}: a label stands twice; name each once"


def _baseline_twice(job: Sections) -> Iterator[str]:
    baselines = job.evaluation.baselines
    if len(set(baselines)) != len(baselines):
        yield f"evaluation.baselines = {toml_value(baselines)}: a baseline stands twice; name each once"


def _momentum_without_sgd(job: Sections) -> Iterator[str]:
    fed = job.federation
    if fed.momentum and fed.optimizer != "sgd":
        yield (
            f'federation.momentum = {fed.momentum}: only used by optimizer = "sgd"; '
            f"remove it or change the optimizer from {toml_value(fed.optimizer)}"
        )


def _head_without_one(job: Sections) -> Iterator[str]:
    if not task_named(job.model.task).has_head and job.adapter.method in HEAD_ONLY:
        yield (
            f"adapter.method = {toml_value(job.adapter.method)}: a {job.model.task} has no task head; "
            "use fed-sb, lora, bias or full"
        )


def _no_frame_from_gradients(job: Sections) -> Iterator[str]:
    adapter = job.adapter
    if adapter.asks_gradients and adapter.method not in WITH_GRADIENT_FRAME:
        yield (
            f"adapter.init = {toml_value(adapter.init)}: only for method = {or_(WITH_GRADIENT_FRAME)}, "
            f'not {toml_value(adapter.method)}; use init = "weights"'
        )


def _no_targets(job: Sections) -> Iterator[str]:
    if not job.adapter.targets:
        yield (
            "adapter.targets = []: names no linear, so nothing would be adapted; "
            'use ["all-linear"] or name some'
        )


def _head_not_trained(job: Sections) -> Iterator[str]:
    if job.adapter.method in HEAD_ONLY and not job.adapter.train_head:
        yield (
            f"adapter.train-head = false: method = {toml_value(job.adapter.method)} trains nothing but "
            "the head; set it to true or choose another method"
        )


def _name_twice(job: Sections, place: int, device: DeviceClass) -> Iterator[str]:
    before = job.simulation.devices[:place]
    if device.name in [dict(other).get("name") for other in before]:  # a name that is not valid is not there
        yield (
            f"simulation.devices.{place}.name = {toml_value(device.name)}: stands twice; "
            "give each class its own name"
        )


def _control_characters(job: Sections) -> Iterator[str]:
    for where, section in named_sections(job):
        for key, value in section:
            texts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(text, str) and CONTROL.search(text) for text in texts):
                yield (
                    f"{where}.{key.replace('_', '-')} = {toml_value(value)}: "
                    "holds a control character; remove it"
                )


def _users(choices: Iterable[Rule | Step]) -> dict[str, tuple[str, ...]]:
    """Of each key that is of one choice or more: their names."""
    found = dict[str, tuple[str, ...]]()
    for choice in choices:
        for key in choice.keys:
            found[key] = (*found.get(key, ()), choice.name)
    return found


def _needed(rule_of: RuleOf, job: Sections) -> Iterator[str]:
    rule = rule_of(job)
    for key in rule.keys:
        if not getattr(job.federation, key):
            yield (
                f"federation.{key.replace('_', '-')} = 0: aggregation = {toml_value(rule.name)} needs it; "
                "set it above 0"
            )


def _of_the_rule(rule_of: RuleOf, job: Sections) -> Iterator[str]:
    yield from rule_of(job).problems(job.federation)


def _robust_in_secret(rule_of: RuleOf, job: Sections) -> Iterator[str]:
    rule = rule_of(job)
    if not rule.sums and job.privacy.secure_aggregation:
        yield (
            f"federation.aggregation = {toml_value(rule.name)}: looks at single updates, "
            f'which secure-aggregation hides; use "{MEAN.name}"'
        )


def _robust_for_whole_clients(rule_of: RuleOf, job: Sections) -> Iterator[str]:
    rule = rule_of(job)
    if not rule.sums and job.privacy.unit == "client":
        yield (
            f"federation.aggregation = {toml_value(rule.name)}: noise for whole clients "
            f'is sized for a mean; use "{MEAN.name}"'
        )


def _rule_checks(rule_of: RuleOf) -> tuple[Check, ...]:
    return (
        *(idle("federation", "aggregation", key, its) for key, its in _users(RULES.values()).items()),
        partial(_needed, rule_of),
        partial(_of_the_rule, rule_of),
        partial(_robust_in_secret, rule_of),
        partial(_robust_for_whole_clients, rule_of),
    )


def _forward(job: Sections) -> bool:
    return job.edge.mode == "forward"


def _only_forward(key: str) -> Check:
    def check(job: Sections) -> Iterator[str]:
        value = getattr(job.edge, key)
        if job.edge.mode != "forward" and value != EdgeSection.model_fields[key].default:
            yield f'edge.{key} = {toml_value(value)}: only for edge.mode = "forward"; remove it'

    return check


def _forward_without_plain_sgd(job: Sections) -> Iterator[str]:
    fed = job.federation
    if fed.optimizer != "sgd" or fed.momentum or fed.weight_decay or fed.head_lr or fed.proximal:
        found = ", ".join(
            f"{name.replace('_', '-')} = {toml_value(getattr(fed, name))}"
            for name in ("optimizer", "momentum", "weight_decay", "head_lr", "proximal")
        )
        yield (
            f'edge.mode = "forward": steps are of sgd with one learning rate, and {found}; '
            'set federation.optimizer = "sgd" and the others to 0'
        )


def _forward_from_gradients(job: Sections) -> Iterator[str]:
    if job.adapter.asks_gradients:
        yield (
            'edge.mode = "forward": devices compute no gradients, and adapter.init = '
            f'{toml_value(job.adapter.init)} asks for them; use "weights"'
        )


def _forward_for_examples(job: Sections) -> Iterator[str]:
    if job.privacy.unit == "example":
        yield (
            'edge.mode = "forward": bounds no single example\'s part of a step; '
            'use privacy.unit = "client" or "none", or edge.mode = "backward"'
        )


_FORWARD_CHECKS: tuple[Check, ...] = (
    *map(_only_forward, ("directions", "perturbation", "share")),
    when(_forward, _forward_without_plain_sgd, _forward_from_gradients, _forward_for_examples),
)


def _unkept_under_privacy(key: str) -> Check:
    """What clients keep from round to round, under privacy; `key` is what makes them."""

    def check(job: Sections) -> Iterator[str]:
        if job.privacy.unit != "none":
            yield (
                f"{_chosen(job, key)}: what clients keep is made without noise, so no epsilon covers "
                'it; set privacy.unit = "none"'
            )
        elif job.privacy.secure_aggregation:
            yield (
                f"{_chosen(job, key)}: was not tried under secure-aggregation, where clients' scores may not "
                "be sent either; set privacy.secure-aggregation = false"
            )

    return check


def _unkept_without_gradients(key: str) -> Check:
    def check(job: Sections) -> Iterator[str]:
        if job.edge.mode == "forward":
            yield f'{_chosen(job, key)}: needs gradients in every step; use edge.mode = "backward"'

    return check


def _unkept_of_a_part(key: str) -> Check:
    def check(job: Sections) -> Iterator[str]:
        if not job.units.chosen.whole:
            yield (
                f"{_chosen(job, key)}: what a client keeps is of all that is trained, and units.strategy = "
                f'{toml_value(job.units.strategy)} trains a part; use "all"'
            )

    return check


_UNKEPT = (_unkept_under_privacy, _unkept_without_gradients, _unkept_of_a_part)


def _chosen(job: Sections, key: str) -> str:
    """`section.key = value` of the job."""
    section, _, name = key.partition(".")
    return f"{key} = {toml_value(getattr(getattr(job, section), name))}"


def _drift_beside_personal(job: Sections) -> Iterator[str]:
    if job.personal.method != "none":
        yield (
            f"{_chosen(job, 'federation.drift')}: is not known to work with "
            f'personal.method = {toml_value(job.personal.method)}; set one of the two to "none"'
        )


def _drift_without_plain_sgd(job: Sections) -> Iterator[str]:
    fed = job.federation
    if fed.optimizer != "sgd" or fed.momentum:
        yield (
            f"{_chosen(job, 'federation.drift')}: is made for plain SGD, and "
            f"optimizer = {toml_value(fed.optimizer)}, "
            f'momentum = {fed.momentum}; set federation.optimizer = "sgd" and momentum = 0'
        )


def _drift_without_the_mean(rule_of: RuleOf, job: Sections) -> Iterator[str]:
    fed = job.federation
    if fed.server_optimizer != AVERAGE.name or not rule_of(job).sums:
        found = (
            f"server-optimizer = {toml_value(fed.server_optimizer)}, "
            f"aggregation = {toml_value(rule_of(job).name)}"
        )
        yield (
            f"{_chosen(job, 'federation.drift')}: the coordinator takes the mean, and {found}; "
            'set them to "average" and "mean"'
        )


def _scaffold_with_a_pull(job: Sections) -> Iterator[str]:
    fed = job.federation
    if fed.drift == "scaffold" and fed.proximal:
        yield (
            f"federation.proximal = {fed.proximal:g}: SCAFFOLD reads a client's gradients off its way, "
            "to which a pull adds; set it to 0"
        )


def _scaffold_weighted(job: Sections) -> Iterator[str]:
    fed = job.federation
    if fed.drift == "scaffold" and fed.weighting != "equal":
        yield (
            f"federation.weighting = {toml_value(fed.weighting)}: SCAFFOLD's controls count all "
            'clients alike; set it to "equal"'
        )


def _fedspeed_without_a_pull(job: Sections) -> Iterator[str]:
    fed = job.federation
    if fed.drift == "fedspeed" and not fed.proximal:
        yield (
            'federation.proximal = 0: drift = "fedspeed" needs the strength of its '
            "pull; give it, 0.1 for a start"
        )


def _drift_checks(rule_of: RuleOf) -> tuple[Check, ...]:
    return (
        idle("federation", "drift", "ascent", ("fedspeed",)),
        when(
            lambda job: job.federation.drift != "none",
            _drift_beside_personal,
            _drift_without_plain_sgd,
            partial(_drift_without_the_mean, rule_of),
            _scaffold_with_a_pull,
            _scaffold_weighted,
            _fedspeed_without_a_pull,
            *(unkept("federation.drift") for unkept in _UNKEPT),
        ),
    )


def _no_head_to_keep(job: Sections) -> Iterator[str]:
    personal, chosen = job.personal, _chosen(job, "personal.method")
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


def _select_without_the_mean(rule_of: RuleOf, job: Sections) -> Iterator[str]:
    fed = job.federation
    if fed.server_optimizer != AVERAGE.name or not rule_of(job).sums:
        found = (
            f"server-optimizer = {toml_value(fed.server_optimizer)}, "
            f"aggregation = {toml_value(rule_of(job).name)}"
        )
        yield (
            f"{_chosen(job, 'personal.method')}: the coordinator takes the mean of each entry over "
            f"the clients that do not keep it, "
            f'and {found}; set them to "average" and "mean"'
        )


def _nothing_to_select(job: Sections) -> Iterator[str]:
    headed = task_named(job.model.task).has_head and job.adapter.train_head
    if job.adapter.method in BIASES_ONLY and not headed:
        yield (
            f"adapter.method = {toml_value(job.adapter.method)}: "
            f"{_chosen(job, 'personal.method')} leaves biases to all, "
            "so that nothing would be a client's "
            'own; choose another adapter, or "ditto"'
        )


def _personal_checks(rule_of: RuleOf) -> tuple[Check, ...]:
    return (
        idle("personal", "method", "strength", ("ditto",)),
        *(idle("personal", "method", key, ("select",)) for key in ("every", "share", "most")),
        when(
            lambda job: job.personal.method != "none",
            _no_head_to_keep,
            when(
                lambda job: job.personal.method == "select",
                partial(_select_without_the_mean, rule_of),
                _nothing_to_select,
            ),
            *(unkept("personal.method") for unkept in _UNKEPT),
        ),
    )


def _overshooting(section: str, key: str) -> Check:
    """Pulls that throw a step of plain SGD further beyond their aim than it was before:
    those of lr times strength from 2 on.
    """

    def check(job: Sections) -> Iterator[str]:
        fed, strength = job.federation, getattr(getattr(job, section), key)
        rate = max(fed.lr, fed.head_lr)
        if fed.optimizer == "sgd" and rate * strength >= 2:
            yield (
                f"{section}.{key} = {strength:g}: times the learning rate {rate:g} it is "
                f"{rate * strength:g}, and from 2 on each step of SGD lands further away; "
                "lower one of the two"
            )

    return check


_OVERSHOOTING_CHECKS: tuple[Check, ...] = (
    _overshooting("federation", "proximal"),
    when(lambda job: job.personal.method == "ditto", _overshooting("personal", "strength")),
)


def _nothing_to_fit(job: Sections) -> Iterator[str]:
    units = job.units
    if units.fit and not any(
        device.memory_mb or (units.seconds and device.speed) for device in job.simulation.devices
    ):
        yield (
            "units.fit = true: no class of simulation.devices has memory-mb, or speed beside units.seconds, "
            "to fit blocks to; give one, or remove it"
        )


def _seconds_of_nothing(job: Sections) -> Iterator[str]:
    units = job.units
    if units.seconds and not units.fit:
        yield f"units.seconds = {units.seconds:g}: only for fit = true; remove it"
    elif units.seconds and not any(device.speed for device in job.simulation.devices):
        yield (
            f"units.seconds = {units.seconds:g}: no class of simulation.devices has a speed, "
            "so training takes no time; give one, or remove it"
        )


def _depth_without_scores(job: Sections, place: int, device: DeviceClass) -> Iterator[str]:
    if device.depth and not job.units.probes:
        yield (
            f"simulation.devices.{place}.depth = {device.depth}: only for strategies that go "
            f"by scores, not {toml_value(job.units.strategy)}; remove it"
        )


def _fit_of_all(job: Sections) -> Iterator[str]:
    if job.units.fit:
        yield 'units.fit = true: strategy = "all" trains every block; remove it, or choose another strategy'


def _budget_of_all(job: Sections) -> Iterator[str]:
    if job.units.budget:
        yield (
            f'units.budget = {job.units.budget}: strategy = "all" trains every block; '
            "remove it, or choose another strategy"
        )


def _own_budget_of_all(job: Sections, place: int, device: DeviceClass) -> Iterator[str]:
    if device.units:
        yield (
            f'simulation.devices.{place}.units = {device.units}: units.strategy = "all" trains every block; '
            "remove it, or choose another strategy"
        )


def _no_budget(job: Sections) -> Iterator[str]:
    units = job.units
    if not units.budget and not units.fit:
        yield (
            f"units.budget = 0: strategy = {toml_value(units.strategy)} needs the number of blocks that "
            "a client trains; give at least 1"
        )


def _units_of_the_head(job: Sections) -> Iterator[str]:
    if job.adapter.method in HEAD_ONLY:
        yield (
            f"units.strategy = {toml_value(job.units.strategy)}: "
            f"adapter.method = {toml_value(job.adapter.method)} trains "
            'nothing in the blocks; use "all"'
        )


def _units_forward(job: Sections) -> Iterator[str]:
    if job.edge.mode == "forward":
        yield (
            f'units.strategy = {toml_value(job.units.strategy)}: with edge.mode = "forward" a step moves '
            'the whole model along a direction; use "all"'
        )


def _one_batch_for_snr(job: Sections) -> Iterator[str]:
    units, score = job.units, job.units.chosen.score
    if score and units.probe_batches < score.fewest:
        yield (
            f"units.probe-batches = {units.probe_batches}: strategy = {toml_value(units.strategy)} compares "
            f"the gradients of batches; give at least {score.fewest}"
        )


def _depth_below_units(job: Sections, place: int, device: DeviceClass) -> Iterator[str]:
    if not device.depth:
        return
    count = device.units or (0 if job.units.fit else job.units.budget)
    if count > device.depth:
        yield (
            f"simulation.devices.{place}.depth = {device.depth}: its clients train {count} blocks; "
            f"give at least {count}, or the class fewer units"
        )


def _scores_unprotected(job: Sections) -> Iterator[str]:
    if job.privacy.unit != "none" or job.privacy.secure_aggregation:
        key = (
            "privacy.secure-aggregation = true"
            if job.privacy.unit == "none"
            else f"privacy.unit = {toml_value(job.privacy.unit)}"
        )
        yield (
            f"{_chosen(job, 'units.strategy')}: scores of single clients' data would leave without "
            f'protection, so it does not go with {key}; use "lisa" or "top"'
        )


def _scores_with_robust_rules(rule_of: RuleOf, job: Sections) -> Iterator[str]:
    rule = rule_of(job)
    if rule.alike:
        yield (
            f"{_chosen(job, 'units.strategy')}: clients train different blocks, whose updates "
            f'federation.aggregation = {toml_value(rule.name)} cannot compare; use "lisa" or "top"'
        )


def _alike(rule_of: RuleOf, job: Sections) -> Iterator[str]:
    """What counts on it that every client trains the same: noise and denominators do, and what one client
    alone trains is seen in the sum, and is that client's.
    """
    if job.privacy.unit == "client":
        yield 'privacy.unit = "client"'
    if job.privacy.secure_aggregation:
        yield "privacy.secure-aggregation = true"
    if rule_of(job).alike:
        yield f"federation.aggregation = {toml_value(rule_of(job).name)}"


def _zeros_fill_in(rule_of: RuleOf, job: Sections) -> bool:
    # noise is on every number, and the denominator stays
    return job.privacy.unit == "client" and rule_of(job).sums


def _fitted_alike(rule_of: RuleOf, job: Sections) -> Iterator[str]:
    if job.units.fit and not _zeros_fill_in(rule_of, job):
        for key in islice(_alike(rule_of, job), 1):
            yield f"units.fit = true: with {key} all clients must train as many blocks; remove it"


def _units_alike(rule_of: RuleOf, job: Sections, place: int, device: DeviceClass) -> Iterator[str]:
    if device.units and device.units != job.units.budget and not _zeros_fill_in(rule_of, job):
        for key in islice(_alike(rule_of, job), 1):
            yield (
                f"simulation.devices.{place}.units = {device.units}: units.budget is {job.units.budget}, "
                f"and with {key} all clients must train as many blocks; remove it"
            )


_PROBING = tuple(strategy.name for strategy in STRATEGIES.values() if strategy.probes)


def _units_checks(rule_of: RuleOf) -> tuple[Check, ...]:
    return (
        *(
            idle("units", "strategy", key, _PROBING)
            for key in ("consistency", "probe_every", "probe_batches")
        ),
        _nothing_to_fit,
        _seconds_of_nothing,
        of_each_class(_depth_without_scores),
        when(
            lambda job: job.units.chosen.whole, _fit_of_all, _budget_of_all, of_each_class(_own_budget_of_all)
        ),
        when(
            lambda job: not job.units.chosen.whole,
            _no_budget,
            _units_of_the_head,
            _units_forward,
            _one_batch_for_snr,
            when(
                lambda job: job.units.probes,
                of_each_class(_depth_below_units),
                _scores_unprotected,
                partial(_scores_with_robust_rules, rule_of),
            ),
            when(
                lambda job: not job.units.probes,
                partial(_fitted_alike, rule_of),
                of_each_class(partial(_units_alike, rule_of)),
            ),
        ),
    )


def _alike_in_rank(rule_of: RuleOf, job: Sections) -> Iterator[str]:
    yield from _alike(rule_of, job)
    if job.federation.drift != "none":
        yield f"federation.drift = {toml_value(job.federation.drift)}"
    if job.personal.method != "none":
        yield f"personal.method = {toml_value(job.personal.method)}"
    if job.edge.mode == "forward":
        yield 'edge.mode = "forward"'


def _rank_of_a_class(rule_of: RuleOf, job: Sections, place: int, device: DeviceClass) -> Iterator[str]:
    if not device.rank:
        return
    chosen = f"simulation.devices.{place}.rank = {device.rank}"
    if job.adapter.method not in WITH_CORES:
        yield (
            f"{chosen}: adapter.method = {toml_value(job.adapter.method)} has no cores with leading "
            f"blocks; remove it, or use {or_(WITH_CORES)}"
        )
    elif device.rank > job.adapter.rank:
        yield (
            f"{chosen}: at most adapter.rank = {job.adapter.rank}, of which all classes train "
            "a leading part; lower it, or raise adapter.rank"
        )
    elif device.rank != job.adapter.rank:
        for key in islice(_alike_in_rank(rule_of, job), 1):
            yield (
                f"{chosen}: adapter.rank is {job.adapter.rank}, and with {key} all clients must train "
                "the same numbers; remove it"
            )


def _checks(rule_of: RuleOf) -> tuple[Check, ...]:
    return (
        _uncounted_clients,
        _no_column,
        _no_concentration,
        _cohort_of_more_than_all,
        _more_replies_than_asked,
        _label_twice,
        _baseline_twice,
        *_rule_checks(rule_of),
        *(idle("federation", "server_optimizer", key, its) for key, its in _users(STEPS.values()).items()),
        _momentum_without_sgd,
        _head_without_one,
        _no_frame_from_gradients,
        _no_targets,
        _head_not_trained,
        *_FORWARD_CHECKS,
        *_units_checks(rule_of),
        of_each_class(partial(_rank_of_a_class, rule_of)),
        *_OVERSHOOTING_CHECKS,
        *_drift_checks(rule_of),
        *_personal_checks(rule_of),
        *PRIVACY_CHECKS,
        of_each_class(_name_twice),
        _control_characters,
    )


CHECKS = _checks(lambda job: RULES[job.federation.aggregation])


def named_sections(job: Sections) -> Iterator[tuple[str, Section]]:
    """Every section with its name, and every table in a list of tables with its place there."""
    for name in type(job).model_fields:
        section = getattr(job, name)
        yield name, section
        for key, found in tables(section):
            yield from ((f"{name}.{key}.{place}", table) for place, table in enumerate(found))
