"""The device owner's policy: what it allows, what it forbids and how it says so, and files that are none."""

from dataclasses import replace

import pytest

from fedtune.adapters.spec import AdapterSpec
from fedtune.bundles.bundle import Manifest
from fedtune.client.policy import FILE, Policy, load_policy, own_epsilon
from fedtune.errors import Refused, UserError
from fedtune.job import Job, parse_job

BASE = "ab" * 32
MANIFEST = Manifest(
    "1",
    "package:x",
    BASE,
    "",
    1,
    "text-classification",
    ("bad", "good"),
    AdapterSpec("fed-sb", 4, 1.0, (), (), ()),
    "",
    "",
    "",
    {},
)


def policy(tmp_path, text: str) -> Policy:
    (tmp_path / FILE).write_text(text)
    return load_policy(tmp_path / FILE)


@pytest.fixture
def private():
    """A job whose epsilon is 4.17."""
    return parse_job(
        "",
        [
            "privacy.unit=example",
            "privacy.epsilon=8.0",
            "privacy.noise-multiplier=1.0",
            "privacy.clip=1.0",
            "privacy.examples=160",
            "federation.weighting=equal",
        ],
    )


def test_an_empty_policy_allows_every_job(tmp_path):
    policy(tmp_path, "").check(MANIFEST, Job())
    assert policy(tmp_path, "") == Policy()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f'allowed-bases = ["{"0" * 64}"]',
            (
                "policy: allowed-bases: the job wants a base of sha256 "
                "abababababababab…, which is not in the list"
            ),
        ),
        ("allowed-bases = []", "policy: allowed-bases: "),
        (
            'allowed-tasks = ["image-classification"]',
            "policy: allowed-tasks: the job wants the task text-classificat…, which",
        ),
        (
            'allowed-methods = ["lora", "head"]',
            "policy: allowed-methods: the job wants the method fed-sb, which",
        ),
        (
            'privacy-unit = "client"',
            "policy: privacy-unit: the job protects nobody, this device wants 'client'",
        ),
        (
            "min-noise-multiplier = 0.1",
            "policy: min-noise-multiplier: the job adds 0, at least 0.1 is wanted",
        ),
        (
            "max-epsilon = 1000000.0",
            "policy: max-epsilon: the job's epsilon is inf, at most 1e+06 is allowed",
        ),
        ("max-rounds = 1", "policy: max-rounds: the job has "),
    ],
)
def test_what_is_forbidden_is_refused_with_its_key(tmp_path, text, reason):
    with pytest.raises(Refused) as e:
        policy(tmp_path, text).check(MANIFEST, Job())
    assert str(e.value).startswith(reason) and e.value.reason == "policy" and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text",
    [
        f'allowed-bases = ["{BASE}"]',
        'allowed-tasks = ["causal-lm", "text-classification"]',
        'allowed-methods = ["fed-sb"]',
        f"max-rounds = {Job().federation.rounds}",
    ],
)
def test_what_is_allowed_is_taken(tmp_path, text):
    policy(tmp_path, text).check(MANIFEST, Job())


def test_privacy_that_a_job_claims_is_held_against_the_policy(tmp_path, private):
    policy(tmp_path, 'privacy-unit = "example"\nmin-noise-multiplier = 1.0\nmax-epsilon = 4.18').check(
        MANIFEST, private
    )
    for text in ('privacy-unit = "client"', "min-noise-multiplier = 1.1", "max-epsilon = 4.16"):
        with pytest.raises(Refused, match=r"^policy: "):
            policy(tmp_path, text).check(MANIFEST, private)
    seeded = private.model_copy(update={"privacy": private.privacy.model_copy(update={"noise": "seeded"})})
    assert 4.16 < own_epsilon(private) < 4.18 and own_epsilon(Job()) == own_epsilon(seeded) == float("inf")


def test_a_promise_that_the_noise_does_not_keep_is_refused(tmp_path, private):
    """Epsilon is worked out here: what the coordinator writes beside it does not count."""
    less = private.model_copy(
        update={"privacy": private.privacy.model_copy(update={"noise_multiplier": 0.6})}
    )
    with pytest.raises(Refused, match=r"^privacy: privacy.noise-multiplier = 0.6: gives epsilon = "):
        policy(tmp_path, "max-epsilon = 100.0").check(MANIFEST, less)


def test_a_manifest_that_names_another_task_or_method_than_its_job_does_not_help(tmp_path):
    """The job is what is run."""
    job = parse_job("", ["model.task=causal-lm", "adapter.method=lora"])
    for text in ('allowed-tasks = ["text-classification"]', 'allowed-methods = ["fed-sb"]'):
        policy(tmp_path, text).check(MANIFEST, Job())
        with pytest.raises(Refused, match=r"^policy: allowed-"):
            policy(tmp_path, text).check(MANIFEST, job)
    with pytest.raises(Refused, match=r"^policy: allowed-tasks"):
        policy(tmp_path, 'allowed-tasks = ["text-classification"]').check(
            replace(MANIFEST, task="causal-lm"), Job()
        )


@pytest.mark.parametrize(
    "text",
    [
        "max-epsilons = 1.0",
        "max_epsilon = 1.0",
        "max-epsilon = 0.0",
        "max-epsilon = -1.0",
        "max-epsilon = inf",
        "max-epsilon = nan",
        'max-epsilon = "8"',
        "max-rounds = 0",
        "max-rounds = 1.5",
        "max-rounds = true",
        'allowed-bases = ["x"]',
        'allowed-bases = "all"',
        'allowed-tasks = ["all"]',
        "min-noise-multiplier = 0.0",
        'privacy-unit = "none"',
        "[policy]\nmax-rounds = 1",
        "max-rounds = ",
        "\x00",
    ],
)
def test_a_policy_that_is_none_stops_the_device(tmp_path, text):
    """A limit that is misspelt would not limit."""
    with pytest.raises(UserError) as e:
        policy(tmp_path, text)
    assert str(e.value).startswith(str(tmp_path / FILE)) and "\n" not in str(e.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "binary"):
        with pytest.raises(UserError, match="cannot be read as a policy"):
            load_policy(path)
