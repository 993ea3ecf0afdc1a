"""What a run spent: figures against direct calls of the accounting libraries,
and what the report says of every kind of run.
"""

import json
import sqlite3
from contextlib import closing
from html import unescape

import opacus
import pytest
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from prometheus_client import generate_latest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.errors import RunError
from fedtune.job import parse_job
from fedtune.privacy.account import SHARES, thinned
from fedtune.privacy.plan import kept, resolved
from fedtune.privacy.releases import Release, Step
from fedtune.report.compare import rows
from fedtune.report.facts import notices
from fedtune.report.format import bound
from fedtune.report.summary import check
from fedtune.runs.folder import RunFolder, create_run
from fedtune.runs.ledger import Ledger
from fedtune.server.metrics import Exporter
from fedtune.workflows.privacy import LIGHT, privacy_of, spent_so_far
from fedtune.workflows.status import lines

EXAMPLE = (
    "privacy.unit=example",
    "privacy.clip=0.5",
    "privacy.examples=160",
    "federation.weighting=equal",
    "federation.rounds=4",
    "data.clients=3",
    "federation.cohort=2",
)
CLIENT = (
    "privacy.unit=client",
    "privacy.clip=0.5",
    "federation.weighting=equal",
    "federation.rounds=4",
    "data.clients=3",
    "federation.cohort=2",
    "privacy.noise-multiplier=4.0",
)
NAMES = ("a", "b", "c")
DRAWN = (["a", "b"], ["a", "c"], ["a", "b"], ["a", "c"])
DELTA = 1e-3
NOISY = (*EXAMPLE, "privacy.noise-multiplier=1.2", "privacy.metrics-noise=4.0", f"privacy.delta={DELTA}")
"""The same noise wherever a figure is read, as readings are kept: 10 steps of 16 of 160 examples a round."""
BOTH = (1.2**-2 + 4.0**-2) ** -0.5
MANY = {"population": {"clients": 500}}


@pytest.fixture
def made(tmp_path):
    """made(settings…, rounds=…) -> the run folder that such a job leaves after some of its rounds, without
    having trained anything.
    """

    def make(*settings, rounds=4, begun=0, facts=None, releases=(), name="run"):
        job = parse_job("", [*settings, "evaluation.baselines=[]"])
        job = resolved(job, 3) if job.privacy.unit != "none" else job
        split = [{"name": n, "natural": None, "train": 9, "held_out": 3, "labels": []} for n in NAMES]
        run = create_run(
            tmp_path / name,
            job,
            {
                "created": "2026-11-20T10:00:00+00:00",
                "versions": {"fedtune": "0.1.0"},
                "sha256": "",
                "split": split,
            }
            | (facts or {}),
        )
        plan = kept(job, 3)
        for round, drawn in enumerate(DRAWN[: rounds + begun], 1):
            release = (
                plan.release(drawn)
                if plan
                else Release(release="updates", mechanism="none", unit="none", clients=2)
            )
            Ledger(run.ledger).record(round, release.facts())
        for round, release in releases:
            Ledger(run.ledger).record(round, release.facts())
        for round in range(rounds + 1):
            run.append_metrics({"round": round, "clients": [], "refused": {}})
        return run

    return make


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300", "NO_COLOR": "1"})


def pld(z, q, count, delta=DELTA):
    event = PoissonSampledDpEvent(q, GaussianDpEvent(z)) if q < 1 else GaussianDpEvent(z)
    return (
        PLDAccountant(value_discretization_interval=1e-3)
        .compose(SelfComposedDpEvent(event, count))
        .get_epsilon(delta)
    )


def rdp(z, q, count, delta=DELTA):
    event = PoissonSampledDpEvent(q, GaussianDpEvent(z)) if q < 1 else GaussianDpEvent(z)
    return RdpAccountant().compose(SelfComposedDpEvent(event, count)).get_epsilon(delta)


def test_figures_are_those_of_the_libraries(made):
    """Client a is in four rounds, b and c in two. Metrics leave beside the update."""
    run = made(*NOISY)
    p = privacy_of(run)
    assert p["readings"]["pld"] == pytest.approx(pld(BOTH, 0.1, 40), rel=1e-9)
    assert p["readings"]["rdp"] == pytest.approx(rdp(BOTH, 0.1, 40), rel=1e-9)
    theirs = opacus.accountants.PRVAccountant()
    theirs.history = [(BOTH, 0.1, 40)]
    assert p["readings"]["prv"] == pytest.approx(theirs.get_epsilon(DELTA), rel=1e-9)
    assert p["epsilon"] == min(p["readings"].values()) == p["readings"][p["accountant"]]
    assert p["client"] == "a" and "a lost most" in p["note"]
    assert [(row["clients"], row["epsilon"]) for row in p["spread"]] == [
        (1, p["epsilon"]),
        (2, pytest.approx(pld(BOTH, 0.1, 20), rel=1e-9)),
    ]
    assert [(row["round"], row["epsilon"]) for row in p["rounds"]][:3] == [
        (r, pytest.approx(pld(BOTH, 0.1, 10 * r), rel=1e-9)) for r in (1, 2, 3)
    ]
    assert p["rounds"][-1] == {"round": 4, "epsilon": p["epsilon"]}
    assert p["parts"] == {
        "update": pytest.approx(pld(1.2, 0.1, 40), rel=1e-9),
        "metrics": pytest.approx(pld(4.0, 0.1, 40), rel=1e-9),
    }
    assert spent_so_far(run, kept(run.job(), 0)) == pytest.approx(p["readings"]["pld"])
    assert "left" not in p and p["target"] == 0.0
    assert "prv" not in privacy_of(run, LIGHT)["readings"]


def test_what_is_left_of_the_promise(made):
    p = privacy_of(made(*NOISY, "privacy.epsilon=5.0", rounds=2), LIGHT)
    assert (
        p["epsilon"] == pytest.approx(pld(BOTH, 0.1, 20))
        and p["target"] == 5.0
        and p["left"] == pytest.approx(5.0 - p["epsilon"])
    )
    assert p["delta"] == DELTA and any("below 1 / 160" in line for line in p["assumptions"])


def test_clients_charged_for_the_rounds_they_were_asked_in(made):
    p = privacy_of(made(*CLIENT, "privacy.participations=4", f"privacy.delta={DELTA}"), LIGHT)
    assert p["epsilon"] == pytest.approx(pld(4.0, 1.0, 4)) and [row["clients"] for row in p["spread"]] == [
        1,
        2,
    ]
    assert any("Sampling: none is counted on" in line for line in p["assumptions"]) and any(
        "Trusted: the coordinator" in line for line in p["assumptions"]
    )


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
def test_clients_that_nobody_knows_were_drawn(sampling, made):
    """All of 500 clients, of whom run.json lists three, have lost the same.

    A fixed number is replace-one: half the multiplier.
    """
    run = made(
        *CLIENT,
        "privacy.amplification=true",
        f"federation.sampling={sampling}",
        f"privacy.delta={DELTA}",
        facts=MANY,
        rounds=1,
    )
    p = privacy_of(run)
    if sampling == "poisson":
        assert p["readings"]["pld"] == pytest.approx(pld(4.0, 2 / 3, 1)) and "prv" in p["readings"]
    else:
        event = SelfComposedDpEvent(SampledWithoutReplacementDpEvent(3, 2, GaussianDpEvent(2.0)), 1)
        accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE).compose(event)
        assert p["readings"] == {"rdp": pytest.approx(accountant.get_epsilon(DELTA))}
        assert "PLD" in invoke("privacy", "report", run.path).stdout and any(
            "(replace-one)" in line for line in p["assumptions"]
        )
    assert (
        p["spread"] == [{"epsilon": p["epsilon"], "clients": 500}] and p["client"] == "" and p["note"] == ""
    )


def test_a_round_that_was_begun_and_not_finished_counts(made):
    """What was asked for may have come; a run that has not begun has spent nothing."""
    begun = privacy_of(made(*NOISY, rounds=2, begun=1), LIGHT)
    assert begun["epsilon"] == pytest.approx(pld(BOTH, 0.1, 30)) and begun["rounds"][-1]["round"] == 3
    fresh = made(*NOISY, rounds=0, name="fresh")
    assert not fresh.ledger.exists()
    p = privacy_of(fresh)
    assert (p["epsilon"], p["note"], p["spread"]) == (
        0.0,
        "Nothing has left the clients yet.",
        [{"epsilon": 0.0, "clients": 3}],
    )
    assert not fresh.ledger.exists() and invoke("privacy", "report", fresh.path).exit_code == 0


SEEDED = (*NOISY, "privacy.noise=seeded")
BARE = [(4, Release(release="gradients", mechanism="none", unit="none", clients=2))]


@pytest.mark.parametrize(
    "settings, releases, said",
    [
        (
            ("federation.rounds=4",),
            (),
            "No differential privacy: epsilon is infinite. Updates were sent as trained.",
        ),
        (SEEDED, (), "Epsilon is infinite: nobody is protected. The noise came from a known seed"),
        (
            NOISY,
            BARE,
            (
                "Epsilon is infinite: nobody is protected. 1 of 5 releases left without "
                "noise, the first in round 4."
            ),
        ),
    ],
    ids=["none", "seeded", "bare"],
)
def test_what_is_not_protected_is_infinite_everywhere(settings, releases, said, made, summary):
    run = made(*settings, releases=releases)
    p = privacy_of(run)
    assert p["epsilon"] == "inf" and spent_so_far(run, kept(run.job(), 0)) == "inf"
    assert json.loads(invoke("privacy", "report", run.path, "--json").stdout) == json.loads(json.dumps(p))
    shown = invoke("privacy", "report", run.path)
    assert (
        shown.exit_code == 0
        and said in shown.stdout
        and not any(name in shown.stdout for name in ("PLD", "RDP", "PRV"))
    )
    page = (run.path / "privacy.html").read_text()
    assert said.partition(". ")[0] in page and "infinite" in page and "<svg" not in page
    whole = check(summary | {"privacy": p})
    assert rows([whole])[0][-1] == "infinite" and any("NOT PRIVATE" in n for n in notices(whole)) == (
        p["unit"] != "none"
    )


@pytest.fixture
def summary():
    """The least that a report reads."""
    return {
        "title": "t",
        "created": "2026-11-20T10:00:00+00:00",
        "versions": {},
        "job": {},
        "engine": "serial",
        "task": "text-classification",
        "metric": "accuracy",
        "labels": [],
        "base": {"source": "s", "sha256": "", "parameters": 1, "licence": ""},
        "adapter": {"method": "head", "rank": 1, "init": "weights", "trainable": 1, "head": 1, "modules": 0},
        "split": [],
        "rounds": [],
        "complete": True,
        "wall_seconds": 0.0,
        "communication": {
            "trainable_numbers": 1,
            "update_bytes": 1,
            "frame_bytes": 0,
            "up": 0,
            "down": 0,
            "messages": 0,
            "clients": [],
        },
    }


def test_the_shape_of_what_a_program_reads(made, summary):
    """Through the check of summary.json nothing is lost; summaries of older versions,
    which had three keys, still load.
    """
    p = json.loads(invoke("privacy", "report", made(*NOISY, "privacy.epsilon=5.0").path, "--json").stdout)
    assert set(p) == {
        "unit",
        "epsilon",
        "note",
        "delta",
        "noise_multiplier",
        "clip",
        "accountant",
        "readings",
        "target",
        "left",
        "client",
        "spread",
        "rounds",
        "parts",
        "assumptions",
    }
    assert json.loads(json.dumps(check(summary | {"privacy": p})["privacy"])) == p
    old = {"unit": "client", "epsilon": 3.2, "note": ""}
    assert check(summary | {"privacy": old})["privacy"] == old


def test_terminal_and_page_have_the_figures(made):
    run = made(*NOISY, "privacy.epsilon=5.0")
    p, done = privacy_of(run), invoke("privacy", "report", run.path)
    page = unescape((run.path / "privacy.html").read_text())
    for text in (done.stdout, page):
        for figure in (
            *p["readings"].values(),
            *p["parts"].values(),
            *(row["epsilon"] for row in p["spread"]),
        ):
            assert bound(figure) in text
        for line in p["assumptions"]:
            assert line in text
    assert (
        'id="run-epsilon-rounds"' in page
        and 'id="run-epsilon-clients"' in page
        and "horizontal line allowed at 5" in page
    )
    assert str(run.path / "privacy.html") in done.stdout


def alter(run, statement):
    with closing(sqlite3.connect(run.ledger)) as db, db:
        db.execute(statement)


@pytest.mark.parametrize(
    "harm, said",
    [
        (
            lambda run: alter(
                run, "UPDATE events SET facts = replace(facts, '1.2', '9.2') WHERE sequence = 2"
            ),
            "event 2 was changed or removed; no privacy can be claimed",
        ),
        (
            lambda run: alter(run, "DELETE FROM events WHERE sequence = 4"),
            "has no event of round 4, but that round was run",
        ),
        (lambda run: run.ledger.unlink(), "is missing; restore it"),
        (lambda run: run.ledger.write_bytes(b"none" * 500), "not a ledger"),
        (
            lambda run: run.ledger.write_bytes(
                run.ledger.read_bytes()[:4096] + bytes(len(run.ledger.read_bytes()) - 4096)
            ),
            "no privacy can be claimed",
        ),
        (
            lambda run: Ledger(run.ledger).record(4, {"release": "updates", "mechanism": "magic"}),
            "an event of the ledger cannot be read",
        ),
        (
            lambda run: (run.path / "job.toml").write_text(
                (run.path / "job.toml").read_text().replace("delta = 0.001", "delta = 0.9")
            ),
            "was changed since the run began",
        ),
    ],
    ids=["changed", "removed", "gone", "nonsense", "torn", "unknown", "job"],
)
def test_nothing_is_claimed_from_what_was_changed(harm, said, made):
    run = made(*NOISY)
    harm(run)
    with pytest.raises(RunError, match=said):
        privacy_of(run)
    for more in ((), ("--json",)):
        done = invoke("privacy", "report", run.path, *more)
        assert (
            done.exit_code == 2
            and not done.stdout
            and len(done.stderr.splitlines()) == 1
            and said in done.stderr
        )
    assert not (run.path / "privacy.html").exists()


def test_of_very_many_histories_few_are_read_and_none_too_small():
    one, other = Step(1.0), Step(2.0)
    found = [(), *(((one, n),) for n in range(1, 101)), ((one, 50), (other, 1))]
    read_as = thinned(found)
    assert set(read_as) == set(found) and read_as[()] == () and read_as[((one, 100),)] == ((one, 100),)
    assert len(set(read_as.values())) <= SHARES + 3
    assert all(dict(read_as[h]).get(step, 0) >= count for h in found for step, count in h)
    assert thinned(found[:5]) == {h: h for h in found[:5]}


def test_a_folder_that_is_no_run(tmp_path):
    done = invoke("privacy", "report", tmp_path)
    assert done.exit_code == 2 and "not a run folder" in done.stderr


FACTS = {"state": "training", "job": "x", "round": 1, "rounds": 4, "queue": [], "devices": [], "line": None}


def test_a_service_says_what_was_spent_so_far():
    exporter = Exporter("127.0.0.1", 0)
    for epsilon, shown in ((None, "0.0"), (1.25, "1.25"), ("inf", "+Inf")):
        exporter.update(FACTS | {"epsilon": epsilon})
        assert f"fedtune_epsilon {shown}\n" in generate_latest(exporter.registry).decode()
    status = FACTS | {
        "address": "x",
        "insecure": False,
        "running": True,
        "pid": 1,
        "run": "r",
        "accuracy": None,
        "bytes": 0,
        "refused": 0,
        "late": 0,
        "seconds_left": None,
        "finished": [],
    }
    for epsilon, said in (
        (None, "not read yet"),
        (1.23411, "epsilon 1.235"),
        ("inf", "epsilon infinite (unprotected)"),
    ):
        assert any(line.endswith(f"privacy spent: {said}") for line in lines(status | {"epsilon": epsilon}))


def test_a_real_run_says_it_in_every_report(tiny_settings, tmp_path):
    """Trained, reported, exported, and reported again from its summary."""
    folder = tmp_path / "run"
    settings = [
        *tiny_settings,
        *NOISY,
        "data.clients=6",
        "federation.cohort=6",
        "privacy.examples=80",
        "federation.rounds=4",
        "report.html=true",
    ]
    flags = [part for value in settings for part in ("--set", value)]
    refused = invoke("simulate", "--out", folder, *flags, "--set", "privacy.noise-multiplier=0.4")
    assert refused.exit_code == 4 and "--i-understand" in refused.stderr and not folder.exists()
    done = invoke("simulate", "--out", folder, *flags)
    assert done.exit_code == 0, done.output
    p = privacy_of(RunFolder(folder))
    said = f"Epsilon is {bound(p['epsilon'])} at delta = {p['delta']:g}, protecting each example."
    assert (
        said in done.stdout
        and said in (folder / "report.html").read_text()
        and said in (folder / "README.md").read_text()
    )
    assert json.loads((folder / "summary.json").read_text())["privacy"] == json.loads(json.dumps(p))
    assert said in invoke("report", folder).stdout
    alter(RunFolder(folder), "DELETE FROM events WHERE sequence = 2")
    assert invoke("report", folder).exit_code == 2


def test_plan_says_what_a_run_will_cost(tiny_settings):
    settings = [
        *tiny_settings,
        "privacy.unit=example",
        "privacy.noise-multiplier=1.0",
        "privacy.clip=0.5",
        "privacy.examples=20",
        "federation.weighting=equal",
        "federation.rounds=2",
    ]
    flags = [part for value in settings for part in ("--set", value)]
    plan = json.loads(invoke("plan", "--json", *flags).stdout)
    assert plan["delta"] == 0.03 and plan["unit"] == "example" and plan["noise_multiplier"] == 1.0
    assert plan["epsilon"] == pytest.approx(pld(1.0, 8 / 20, 6, 0.03))
    shown = invoke("plan", *flags).stdout
    assert f"epsilon {bound(plan['epsilon'])}" in shown and "delta = 0.03; noise multiplier 1" in shown
    assert (
        json.loads(invoke("plan", "--json", *flags, "--set", "privacy.noise=seeded").stdout)["epsilon"]
        == "inf"
    )
    assert invoke("plan", *flags, "--set", "privacy.noise-multiplier=0.4").exit_code == 4
    assert invoke("plan", *flags, "--set", "privacy.noise-multiplier=0.4", "--i-understand").exit_code == 0
