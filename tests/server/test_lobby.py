"""Devices of a live job that come, go and come back while it runs, without a network."""

from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedtune.bundles.offer import OfferAnswer
from fedtune.job import parse_job
from fedtune.server.app import GridExchange
from fedtune.server.lobby import Lobby
from fedtune.wire import RECORD

JOB = parse_job(
    "",
    [
        "adapter.rank=4",
        'simulation.devices=[{name = "phone", rank = 2, units = 1}]',
        "units.strategy=top",
        "units.budget=2",
    ],
)


class Grid:
    """Keeps what is pushed; `answers` says what a device answers to an offer, None nothing."""

    def __init__(self):
        self.pushed, self.answers, self.waiting = [], {}, []

    def push_messages(self, messages):
        messages = list(messages)
        numbers = [str(len(self.pushed) + place) for place in range(len(messages))]
        self.pushed += messages
        for number, message in zip(numbers, messages):
            message.metadata.__dict__["_message_id"] = number
            if message.metadata.message_type == "query" and (
                answer := self.answers.get(message.metadata.dst_node_id)
            ):
                self.waiting.append(
                    Message(RecordDict({RECORD: ConfigRecord(answer.dump())}), reply_to=message)
                )
        return numbers

    def pull_messages(self, numbers):
        found = [m for m in self.waiting if m.metadata.reply_to_message_id in set(numbers)]
        self.waiting = [m for m in self.waiting if m not in found]
        return found


@pytest.fixture
def place(monkeypatch):
    """Two ready devices, "a" of class phone and "b" of none: with the lobby, its grid,
    and by node when each joined.
    """
    for name in ("_run_id", "_task_id", "_node_id"):  # a message of Flower's asks for them
        monkeypatch.setattr(TaskIdentity, name, 1)
    grid, joined = Grid(), {1: "monday", 2: "monday"}
    grid.answers = {1: OfferAnswer("ready", "", "", 10, 2, "phone"), 2: OfferAnswer("ready", "", "", 10, 2)}
    bundle = SimpleNamespace(job=JOB, digest="0" * 64, frame_bytes=0)
    lobby = Lobby(
        SimpleNamespace(online=lambda: joined), grid, bundle, lambda: {1: "a", 2: "b"}, lambda guest: None
    )
    lobby.visit()
    return SimpleNamespace(lobby=lobby, grid=grid, joined=joined)


def test_a_device_is_of_the_class_that_it_names(place):
    assert [info.name for info in place.lobby.ready()] == ["a", "b"]
    assert place.lobby.device("a") == JOB.simulation.devices[0]
    assert place.lobby.device("b") is None and place.lobby.device("nobody") is None


def test_a_device_that_comes_back_with_a_class_that_the_job_lacks_is_refused(place):
    place.grid.answers[1] = OfferAnswer("ready", "", "", 10, 2, "tablet")
    place.joined[1] = "tuesday"
    place.lobby.visit()
    assert [info.name for info in place.lobby.ready()] == ["b"]
    assert place.lobby.guests[1].state == "refused" and '"tablet"' in place.lobby.guests[1].reason


def test_a_device_that_comes_back_may_name_another_class(place):
    place.grid.answers[2] = OfferAnswer("ready", "", "", 10, 2, "phone")
    place.joined[2] = "tuesday"
    place.lobby.visit()
    assert place.lobby.device("b") == JOB.simulation.devices[0]


def test_a_device_without_a_key_that_comes_back_is_asked_where_it_is(place):
    """It is another node then; the old one is still among the guests."""
    answers = {
        7: OfferAnswer("ready", "", "mine", 10, 2, "phone"),
        3: OfferAnswer("ready", "", "mine", 10, 2),
    }
    place.grid.answers |= answers
    place.joined.clear()
    lobby = Lobby(
        SimpleNamespace(online=lambda: place.joined),
        place.grid,
        place.lobby._bundle,
        None,
        lambda guest: None,
    )
    place.joined[7] = "monday"
    lobby.visit()
    assert lobby.nodes(["mine"]) == [7] and lobby.device("mine") == JOB.simulation.devices[0]
    del place.joined[7]
    place.joined[3] = "tuesday"
    lobby.visit()
    assert lobby.guests.keys() == {7, 3} and [info.name for info in lobby.ready()] == ["mine"]
    assert lobby.nodes(["mine"]) == [3] and lobby.device("mine") is None
    del place.joined[3]
    place.joined[7] = "wednesday"
    lobby.visit()
    assert lobby.nodes(["mine"]) == [7]


def test_who_left_since_the_draw_is_not_asked_and_not_waited_for(place):
    """As while a probe is answered: a round is planned for those who were drawn before it."""
    place.grid.answers[1] = None
    place.joined[1] = "tuesday"  # it is offered the job anew, and has not answered yet
    place.lobby.visit()
    assert place.lobby.nodes(["a", "b", "nobody"]) == [None, 2, None]
    exchange = GridExchange(place.grid, 0.0, lambda grid, names: place.lobby.nodes(list(names)))
    assert not list(exchange([("a", b"x"), ("b", b"y")]))
    assert [m.metadata.dst_node_id for m in place.grid.pushed if m.metadata.message_type == "train"] == [2]
