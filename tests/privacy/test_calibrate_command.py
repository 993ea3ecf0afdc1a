"""Which noise for this epsilon, which epsilon for this noise: known values, refusals,
and what stands out of the noise.
"""

import json

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.errors import PrivacyRefused, UserError
from fedtune.workflows import calibrate
from fedtune.workflows.calibrate import make_calibration, read_job
from fedtune.workflows.plan import make_plan

NO_BASE = ("model.source=/none", "adapter.method=lora")
EXAMPLE = (*NO_BASE, "privacy.unit=example", "privacy.examples=160")
CLIENT = (*NO_BASE, "privacy.unit=client")


def invoke(*arguments, settings=()):
    flags = [part for value in settings for part in ("--set", value)]
    return CliRunner().invoke(
        app, ["privacy", "calibrate", *arguments, *flags], env={"COLUMNS": "300", "NO_COLOR": "1"}
    )


def answers(*settings, epsilons=(), noises=()):
    return make_calibration(read_job(None, settings), epsilons, noises)


# Clients, cohort, rounds, multiplier; then epsilon by (RDP, PLD) without amplification, by (RDP, PLD) with
# Poisson cohorts, and by RDP with cohorts of a fixed size, where one client is exchanged for another.
KNOWN = [
    (1000, 50, 100, 1.0, (86.9, 82.0), (2.90, 2.40), 30.35),
    (1000, 50, 100, 2.0, (30.5, 28.2), (0.88, 0.75), 5.08),
    (10000, 100, 200, 1.0, (161, 155), (1.16, 0.78), 10.9),
    (100, 10, 50, 1.0, (45.6, 41.8), (3.16, 2.48), 40.6),
    (100, 10, 50, 2.0, (16.0, 14.3), (0.94, 0.75), 6.2),
]


@pytest.mark.parametrize(
    "clients, cohort, rounds, z, none, poisson, fixed", KNOWN, ids=[f"{n}-{z:g}" for n, _, _, z, *_ in KNOWN]
)
def test_known_values(clients, cohort, rounds, z, none, poisson, fixed):
    """Computed before any of this was written, and rounded to the digits that stand here."""
    settings = (
        *CLIENT,
        f"data.clients={clients}",
        f"federation.cohort={cohort}",
        f"federation.rounds={rounds}",
        f"privacy.delta={clients**-1.1}",
        "privacy.i-understand=true",
    )
    bare, drawn = answers(*settings, "federation.sampling=poisson", noises=[z]).rows
    (_, exact) = answers(*settings, noises=[z]).rows
    assert not bare.amplification and (bare.readings["rdp"], bare.readings["pld"]) == pytest.approx(
        none, rel=6e-3
    )
    assert drawn.amplification and (drawn.readings["rdp"], drawn.readings["pld"]) == pytest.approx(
        poisson, rel=8e-3
    )
    assert exact.readings == {"rdp": pytest.approx(fixed, rel=6e-3)} and exact.sampling == "fixed"
    assert (
        drawn.rate == exact.rate == cohort / clients
        and bare.rate == 1.0
        and (bare.rounds, bare.steps) == (rounds, rounds)
    )
    assert bare.epsilon == min(bare.readings.values())


def test_noise_and_epsilon_are_each_others_answer():
    # every step takes all, which is read in a moment
    whole = (*NO_BASE, "privacy.unit=example", "privacy.examples=16")
    (forth,) = answers(*whole, epsilons=[3.0]).rows
    (back,) = answers(*whole, noises=[forth.noise_multiplier]).rows
    assert 2.97 < forth.epsilon <= 3.0 and back.epsilon == forth.epsilon
    assert (forth.rounds, forth.steps, forth.rate, forth.sampling, forth.delta) == (
        10,
        10,
        1.0,
        "poisson",
        0.04,
    )
    assert answers(*whole, "privacy.participations=2", noises=[3.0]).rows[0].steps == 2


def test_what_is_asked_when_nothing_is(monkeypatch):
    """The usual, and the job's own way."""
    assert calibrate.EPSILONS == (1.0, 3.0, 10.0)
    monkeypatch.setattr(calibrate, "EPSILONS", (3.0,))
    job = read_job(
        None, [*NO_BASE, "privacy.unit=example", "privacy.examples=16", "privacy.noise-multiplier=2.5"]
    )
    assert (job.privacy.clip, job.federation.weighting) == (1.0, "equal")
    assert [row.asked for row in make_calibration(job).rows] == ["epsilon 3", "noise 2.5"]


def test_seeded_noise_gives_no_epsilon():
    found = answers(*EXAMPLE, "privacy.noise=seeded", noises=[2.0])
    assert (
        found.rows[0].epsilon == "inf"
        and set(found.rows[0].readings.values()) == {"inf"}
        and "seeded" in found.warnings[0]
    )


def test_signal_to_noise_by_part(tiny_settings):
    """The parts are those that `fedtune plan` counts; the ratio is that of the head of the module."""
    settings = (*tiny_settings, "privacy.unit=example", "privacy.examples=80")
    found, plan = (
        answers(*settings, noises=[2.0]),
        make_plan(read_job(None, [*settings, "privacy.noise-multiplier=2.0"])),
    )
    parts = {part.name: part for part in found.parts}
    assert parts["the whole adapter"].numbers == plan.trainable and parts["head"].numbers == plan.head
    assert (
        parts["each of block.0 to block.1"].count == 2
        and parts["each of block.0 to block.1"].numbers == plan.units[0].numbers
    )
    assert (parts["each core"].count, parts["each core"].numbers) == (plan.modules, 16)
    assert found.rows[0].signal_to_noise["each core"] == pytest.approx(8 / (2.0 * 4)) and found.rows[
        0
    ].signal_to_noise["head"] == pytest.approx(8 / (2.0 * plan.head**0.5))
    client = answers(*tiny_settings, "privacy.unit=client", noises=[8.0])
    assert (
        all(row.signal_to_noise["each core"] == pytest.approx(2 / (8.0 * 4)) for row in client.rows)
        and "cohort" in client.definition
    )


def test_without_data_and_without_the_base(tiny_settings, tmp_path):
    bare = answers(
        *tiny_settings,
        f"data.source={tmp_path}/none.csv",
        "privacy.unit=example",
        "privacy.examples=80",
        noises=[2.0],
    )
    assert [part.name for part in bare.parts] == [
        "the whole adapter",
        "each of block.0 to block.1",
        "each core",
    ] and "the head is left out" in bare.notes[0]
    known = answers(
        "model.source=/none", "adapter.rank=8", "privacy.unit=example", "privacy.examples=160", noises=[2.0]
    )
    assert [(part.name, part.numbers) for part in known.parts] == [
        ("each core", 64)
    ] and "shapes of the base are not known" in known.notes[0]
    assert "no signal to noise can be given" in answers(*EXAMPLE, noises=[2.0]).notes[0]


def test_with_and_without_amplification():
    """The job's own way comes first and is the one that is checked: by the other alone,
    this one would be refused.
    """
    settings = (*CLIENT, "data.clients=1000", "federation.sampling=poisson")
    assert [
        row.amplification for row in answers(*settings, "privacy.amplification=true", noises=[1.0]).rows
    ] == [True, False]
    with pytest.raises(PrivacyRefused, match="above 10"):
        answers(*settings, noises=[0.9])
    lone = answers(*settings, "privacy.participations=1", noises=[1.0])
    assert [(row.amplification, row.rounds) for row in lone.rows] == [(False, 1), (True, 10)]
    (shared,) = answers(*CLIENT, "data.clients=1000", "privacy.secure-aggregation=true", noises=[8.0]).rows
    assert not shared.amplification and set(shared.readings) == {"rdp"}


@pytest.mark.parametrize(
    "arguments, settings, code, said",
    [
        (
            (),
            (),
            2,
            (
                'privacy.unit = "none": there is nothing to calibrate; say what to protect: '
                "--set privacy.unit=example"
            ),
        ),
        ((), ("privacy.unit=example",), 2, "privacy.examples = 0"),
        (("--epsilon", "0"), EXAMPLE, 2, "--epsilon 0: must be a number above 0"),
        (("--noise", "nan"), EXAMPLE, 2, "--noise nan: must be a number above 0"),
        (("--clients", "4"), CLIENT, 2, "federation.cohort = 8: at most data.clients = 4"),
        (("--clients", "0"), CLIENT, 2, "data.clients = 0: how many clients there are decides"),
        (
            ("--noise", "1"),
            (*EXAMPLE, "privacy.delta=0.01"),
            4,
            "privacy.delta = 0.01: with 160 examples it must be below 0.0063",
        ),
        (
            ("--noise", "1"),
            (*CLIENT, "privacy.delta=0.05"),
            4,
            "privacy.delta = 0.05: with 24 clients it must be below 0.042",
        ),
        (
            ("--noise", "0.4"),
            EXAMPLE,
            4,
            "above 10, which protects little; add noise, or say that you mean it with --i-understand",
        ),
        (("--epsilon", "12"), CLIENT, 4, "--i-understand"),
    ],
)
def test_wrong_and_dangerous_settings(arguments, settings, code, said):
    done = invoke(*arguments, settings=settings)
    assert done.exit_code == code and not done.stdout and said in done.stderr, done.output
    assert done.stderr.startswith("fedtune: ") and len(done.stderr.splitlines()) == (
        2 if "1 problem" in done.stderr else 1
    )


def test_danger_can_be_meant_and_few_clients_are_warned_of():
    meant = invoke("--noise", "0.4", "--i-understand", "--json", settings=EXAMPLE)
    assert meant.exit_code == 0 and json.loads(meant.stdout)["rows"][0]["epsilon"] > 10
    few = invoke("--noise", "4", settings=CLIENT)
    assert (
        few.exit_code == 0
        and "! 24 clients: the noise of client-level privacy is 0.5 in each number" in few.stdout
    )


def test_what_is_printed_and_what_a_program_reads(tiny_settings):
    settings = (*tiny_settings, "privacy.unit=example", "privacy.examples=160", "federation.batch-size=16")
    shown, found = (
        invoke("--noise", "1.2", settings=settings),
        json.loads(invoke("--noise", "1.2", "--json", settings=settings).stdout),
    )
    assert set(found) == {"unit", "units", "rows", "parts", "definition", "warnings", "notes"}
    (row,) = found["rows"]
    assert set(row) == {
        "asked",
        "amplification",
        "noise_multiplier",
        "epsilon",
        "readings",
        "delta",
        "rounds",
        "steps",
        "sampling",
        "rate",
        "signal_to_noise",
    }
    for text in (
        "noise 1.2",
        f"delta = {row['delta']:g}",
        "each core",
        "A ceiling of the signal, no prediction of accuracy.",
        f"{row['signal_to_noise']['each core']:.2g}",
    ):
        assert text in shown.stdout


def test_a_job_that_is_no_job(tmp_path):
    (tmp_path / "job.toml").write_text("privacy = 3\n")
    with pytest.raises(UserError, match="privacy = 3: is a section"):
        read_job(tmp_path / "job.toml")


@pytest.mark.parametrize("command", ["report", "calibrate"])
def test_help_has_examples(command):
    done = CliRunner().invoke(app, ["privacy", command, "--help"], env={"COLUMNS": "300"})
    assert done.exit_code == 0 and f"Examples:  fedtune privacy {command}" in done.stdout
