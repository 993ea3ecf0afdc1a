"""All problems at once: wrong keys beside rules between keys, and no rule that a wrong key might settle."""

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedtune.errors import JobError
from fedtune.job import DeviceClass, Job, job_from, parse_job

RULES = {  # keys that are set, where each line begins, and all keys that its rule needs
    "cohort": (
        {"federation.cohort": 99},
        "federation.cohort = 99: at most data.clients",
        {"federation.cohort", "data.clients"},
    ),
    "labels": (
        {"data.labels": ["a", "a"]},
        'data.labels = ["a", "a"]: a label stands twice',
        {"data.labels"},
    ),
    "momentum": (
        {"federation.momentum": 0.5},
        "federation.momentum = 0.5: only used by",
        {"federation.momentum", "federation.optimizer"},
    ),
    "targets": ({"adapter.targets": []}, "adapter.targets = []: names no linear", {"adapter.targets"}),
    "ascent": (
        {"federation.ascent": 0.5},
        "federation.ascent = 0.5: only for drift",
        {"federation.ascent", "federation.drift"},
    ),
    "examples": (
        {"privacy.examples": 9},
        'privacy.examples = 9: privacy.unit = "none"',
        {"privacy.examples", "privacy.unit"},
    ),
    "share": (
        {"personal.share": 0.5},
        "personal.share = 0.5: only for method",
        {"personal.share", "personal.method"},
    ),
    "budget": ({"units.budget": 2}, 'units.budget = 2: strategy = "all"', {"units.budget", "units.strategy"}),
    "depth": (
        {"simulation.devices": [{"name": "a", "depth": 2, "rank": 99}, {"name": "b", "speed": 3}]},
        "simulation.devices.0.depth = 2: only for strategies",
        {"units.strategy"},
    ),
    "rank": (
        {"simulation.devices": [{"name": "a", "depth": 2, "rank": 99}, {"name": "b", "speed": 3}]},
        "simulation.devices.0.rank = 99: at most adapter.rank = 16",
        {"adapter.rank", "adapter.method"},
    ),
    "none": ({"report.title": "a\x00"}, 'report.title = "a\\u0000": holds a control', {"report.title"}),
}
WRONG = {  # a value that a key does not take, and how its line begins
    "adapter.rank": (0, "adapter.rank = 0: must be"),
    "adapter.method": ("flora", 'adapter.method = "flora": not available yet'),
    "data.clients": (-1, "data.clients = -1: must be"),
    "data.labels": ("a", 'data.labels = "a": must be a list'),
    "federation.cohort": ("many", 'federation.cohort = "many": must be'),
    "federation.optimizer": ("lion", 'federation.optimizer = "lion": must be'),
    "federation.drift": (1, "federation.drift = 1: must be"),
    "personal.method": ("own", 'personal.method = "own": must be'),
    "privacy.unit": (True, "privacy.unit = true: must be"),
    "units.strategy": ("some", 'units.strategy = "some": must be'),
    "federation.rnds": (3, "federation.rnds: unknown key; did you mean rounds?"),
    "reprot.html": (True, "reprot: unknown section; did you mean report?"),
}
NONE_TAKES = {"x": 1}
FIELDS = {
    f"{section}.{name.replace('_', '-')}": (type(found.default), name, field)
    for section, found in Job.model_fields.items()
    for name, field in type(found.default).model_fields.items()
    if name != "devices"
}
CLASS_FIELDS = {
    name.replace("_", "-"): (DeviceClass, name, field) for name, field in DeviceClass.model_fields.items()
}


def lines(raw):
    try:
        job_from(raw)
    except JobError as e:
        return e.problems
    return []


def nested(by_key):
    raw = {}
    for key, value in by_key.items():
        section, _, name = key.partition(".")
        raw.setdefault(section, {})[name] = value
    return raw


def values(section, name, field):
    """Some values that a key takes."""
    tried = [True, False, 0, 1, 2, 3, 9, 20, 40, 0.05, 0.5, 3.0, "", "x", [], ["head"], ["a", "a"]]
    return [value for value in (*tried, *get_args(field.annotation)) if taken(section, name, value)]


def taken(section, name, value):
    given = tuple(value) if isinstance(value, list) else value
    try:
        section.model_validate(({"name": "a"} if section is DeviceClass else {}) | {name: given})
    except ValidationError:
        return False
    return True


VALUES = {key: values(*field) for key, field in FIELDS.items()}
CLASS_VALUES = {key: values(*field) for key, field in CLASS_FIELDS.items()}


def some(values, most):
    return st.lists(st.sampled_from(sorted(values)), max_size=most, unique=True).flatmap(
        lambda keys: st.fixed_dictionaries({key: st.sampled_from(values[key]) for key in keys})
    )


@settings(deadline=None)
@given(st.sets(st.sampled_from(sorted(RULES))), st.sets(st.sampled_from(sorted(WRONG))))
def test_each_wrong_key_and_each_rule_whose_keys_are_valid(rules, wrong):
    changed = {key: value for rule in rules for key, value in RULES[rule][0].items()}
    with_classes = rules | ({"depth", "rank"} if rules & {"depth", "rank"} else set())
    found = lines(nested(changed | {key: WRONG[key][0] for key in wrong}))
    expected = [WRONG[key][1] for key in wrong] + [
        RULES[rule][1] for rule in with_classes if not RULES[rule][2] & wrong
    ]
    assert len(found) == len(expected)
    assert all(any(line.startswith(begin) for line in found) for begin in expected)


@settings(deadline=None)
@given(
    some(VALUES, most=60),
    st.lists(some(CLASS_VALUES, most=6), max_size=3),
    st.sets(st.sampled_from(sorted(VALUES)), max_size=20),
    st.sets(st.tuples(st.integers(0, 2), st.sampled_from(sorted(CLASS_VALUES))), max_size=2),
    st.data(),
)
def test_a_line_beside_a_wrong_key_stands_whatever_that_key_becomes(changed, classes, wrong, in_class, data):
    classes = [{"name": f"c{place}"} | own for place, own in enumerate(classes)]
    in_class = {(place, key) for place, key in in_class if place < len(classes)}

    def job(other, other_in_class):
        rows = [
            own | {key: other_in_class[place, key] for at, key in in_class if at == place}
            for place, own in enumerate(classes)
        ]
        return nested(changed | other | {"simulation.devices": rows})

    found = lines(job(dict.fromkeys(wrong, NONE_TAKES), dict.fromkeys(in_class, NONE_TAKES)))
    keys = [*wrong, *(f"simulation.devices.{place}.{key}" for place, key in in_class)]
    about_wrong = [line for line in found if any(line.startswith(f"{key} = {{x = 1}}: ") for key in keys)]
    assert len(about_wrong) == len(keys)
    for _ in range(3):
        filled = lines(
            job(
                {key: data.draw(st.sampled_from(VALUES[key])) for key in sorted(wrong)},
                {(at, key): data.draw(st.sampled_from(CLASS_VALUES[key])) for at, key in sorted(in_class)},
            )
        )
        assert [line for line in filled if line in found] == list(found[len(about_wrong) :])


def test_the_lines_of_keys_come_first():
    assert [
        line.partition(":")[0] for line in lines(nested({"federation.cohort": 99, "adapter.rank": 0}))
    ] == ["adapter.rank = 0", "federation.cohort = 99"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("federation = 3\n[data]\nlabels = ['a', 'a']", ["federation = 3", "data.labels"]),
        (
            "[simulation]\ndevices = [3, {name = 'a', depth = 2}, {name = 'a'}]",
            ["simulation.devices.0 = 3", "simulation.devices.1.depth", "simulation.devices.2.name"],
        ),
        (
            "[simulation]\ndevices = 3\n[data]\ntext = \"a\\u0000\"\n[units]\nstrategy = 'top'\nfit = true",
            ["simulation.devices = 3", "data.text"],
        ),
        (
            "[[simulation.devices]]\ndepth = 2\n[[simulation.devices]]\nname = ''\nspeeed = 2\nrank = 99",
            [
                "simulation.devices.0.name: is missing",
                "simulation.devices.1.name",
                "simulation.devices.1.speeed",
                "simulation.devices.0.depth",
                "simulation.devices.1.rank",
            ],
        ),
        (  # nobody knows which of the two rates is meant
            "[federation]\nhead-lr = 0.1\nhead_lr = 9.0\nproximal = 100.0\noptimizer = 'sgd'",
            ["federation.head-lr: unknown key; it stands twice"],
        ),
        (
            "[privacy]\nunit = 'client'\nclip = 1.0\nepsilon = -1.0\nsecure-aggregation = 3\n"
            "[federation]\nmin-replies = 2",
            ["privacy.epsilon", "privacy.secure-aggregation", "federation.weighting"],
        ),
    ],
)
def test_whole_sections_tables_and_keys_given_twice(text, expected):
    with pytest.raises(JobError) as e:
        parse_job(text)
    found = list(e.value.problems)
    assert len(found) == len(expected), found
    assert all(line.startswith(begin) for line, begin in zip(found, expected)), found
