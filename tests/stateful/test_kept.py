"""What clients keep: versions by round, what is removed, and files that are not what they should be."""

import json
import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedtune.errors import RunError
from fedtune.stateful.store import KEY, Kept
from fedtune.types import TensorSpec
from fedtune.wire import Schema

SCHEMA = Schema((TensorSpec("a.R", (2, 2), "block.0"), TensorSpec("head.bias", (3,), "head")))


def values(number):
    return {"a.R": np.full((2, 2), number, np.float32), "head.bias": np.arange(3, dtype=np.float32) + number}


def rounds(kept, client):
    return sorted(int(p.stem) for p in kept._place(client).glob("*.safetensors"))


def test_the_newest_up_to_a_round_counts(tmp_path):
    kept = Kept(tmp_path / "clients", SCHEMA)
    assert (
        kept.load("x", 9) is None
        and list(kept.clients(("z", "y", "x"), 9)) == []
        and not (tmp_path / "clients").exists()
    )
    for round in (2, 3, 6):
        kept.save("x", round, values(round))
    kept.save("y", 5, values(50))
    # 2 is long past: no checkpoint needs it when round 6 is done
    for round, expected in ((2, None), (3, 3), (5, 3), (6, 6), (100, 6)):
        found = kept.load("x", round)
        assert (found is None) == (expected is None)
        assert expected is None or all(
            np.array_equal(found[n], a) and found[n].dtype == np.float32 for n, a in values(expected).items()
        )
    assert (
        list(kept.clients(("z", "y", "x"), 9)) == ["y", "x"]
        and list(kept.clients(("z", "y", "x"), 4)) == ["x"]
        and list(kept.clients(("z", "y", "x"), 1)) == []
    )


@pytest.mark.parametrize("trained", [range(1, 8), (1, 4, 5, 9), (1, 9, 10), (7, 8)])
def test_every_checkpoint_that_is_kept_finds_its_own(trained, tmp_path):
    """A run keeps the checkpoints of the last two rounds: whatever round it goes on from,
    its clients have what they had then.
    """
    kept, last = Kept(tmp_path, SCHEMA), 0
    for round in trained:
        kept.save("x", round, values(round))
        last = round
        for checkpoint in (last - 1, last - 2):
            true = max((r for r in trained if r <= checkpoint), default=None)
            found = kept.load("x", checkpoint)
            assert (found is None) == (true is None) and (true is None or found["a.R"][0, 0] == true)
    assert len(rounds(kept, "x")) <= 3


def test_a_run_that_went_back_forgets_what_it_has_not_had(tmp_path):
    kept = Kept(tmp_path, SCHEMA)
    for round in (4, 5, 6):
        kept.save("x", round, values(round))
    assert kept.load("x", 4)["a.R"][0, 0] == 4  # from the checkpoint after round 4
    (kept._place("x") / ".00006.safetensors.abc.part").write_bytes(b"cut off")
    kept.save("x", 5, values(55))
    assert not list(kept._place("x").glob(".*"))
    assert rounds(kept, "x") == [4, 5] and kept.load("x", 9)["a.R"][0, 0] == 55


def test_nobody_else_may_read_it_and_a_device_is_one_client(tmp_path):
    kept = Kept(tmp_path / "clients", SCHEMA, owner="device")
    kept.save("a name", 1, values(1))
    assert kept.load("another name", 1)["a.R"][0, 0] == 1
    (path,) = (tmp_path / "clients").rglob("*.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and all(
        stat.S_IMODE(p.stat().st_mode) == 0o700 for p in path.parents[:3]
    )
    for round in range(2, 40):
        kept.save(f"name {round}", round * 1000, values(round))
    assert len(list((tmp_path / "clients").rglob("*.safetensors"))) <= 2


def facts(**changes):
    return {KEY: json.dumps({"format": "1", "client": "x", "round": 3} | changes)}


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-5]), "invalid|incomplete|offset"),
        (lambda p: p.write_bytes(b"\x80\x04pickled"), "header"),
        (lambda p: p.write_bytes(b""), "header"),
        (lambda p: p.write_bytes(p.read_bytes() + b"0" * 20_000), "more than 12,316 bytes"),
        (lambda p: save_file(values(1), p), "metadata|fedtune|Key"),
        (lambda p: save_file(values(1), p, facts(client="y")), "it is of another client or round"),
        (lambda p: save_file(values(1), p, facts(round=2)), "it is of another client or round"),
        (lambda p: save_file(values(1), p, facts(format="2")), "format '2', this fedtune reads 1"),
        (lambda p: save_file(values(1), p, {KEY: "[]"}), ""),
        (lambda p: save_file(values(np.nan), p, facts()), "a number is not finite"),
        (
            lambda p: save_file({n: a.astype(np.float64) for n, a in values(1).items()}, p, facts()),
            "its tensors are not those",
        ),
        (lambda p: save_file({"a.R": values(1)["a.R"]}, p, facts()), "its tensors are not those"),
    ],
)
def test_a_file_that_is_not_its_own_is_one_line_with_a_remedy(spoil, why, tmp_path):
    kept = Kept(tmp_path, SCHEMA)
    kept.save("x", 3, values(3))
    (path,) = tmp_path.rglob("*.safetensors")
    spoil(path)
    with pytest.raises(
        RunError,
        match=(
            rf"{path}: not what a client of this job keeps \(.*({why}).*\); "
            rf"restore it, or remove its folder {path.parent}, and the client begins anew$"
        ),
    ) as e:
        kept.load("x", 3)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700
