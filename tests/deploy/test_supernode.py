"""Our changes to Flower's SuperNode, on Flower's own loop and state."""

from types import ModuleType

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from fedtune.client.supernode_process import drop_whole


def ended(*_: object) -> bytes:
    raise RunNotRunningException


@pytest.fixture(autouse=True)
def as_the_coordinator(monkeypatch) -> None:
    for name in ("run", "task", "node"):
        monkeypatch.setattr(TaskIdentity, f"_{name}_id", 7)


def receive_of_an_ended_run(loop: ModuleType) -> tuple[InMemoryNodeState, InMemoryObjectStore, str]:
    """State and store after a message whose run ended before its content was there."""
    store = InMemoryObjectStore()
    state = InMemoryNodeState(store)
    state.set_node_id(1)
    run = Run.create_empty(7)
    state.store_run(run)
    state.set_run_series_context(
        run.series_id, Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config={})
    )
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = message.object_id
    found = loop._pull_and_store_message(
        state=state,
        object_store=store,
        node_config={},
        receive=lambda: (message, get_object_tree(message)),
        get_run=lambda _: run,
        get_fab=ended,
        pull_object=ended,
        confirm_message_received=ended,
        trusted_entities=None,
    )
    assert found is None
    return state, store, message.object_id


@pytest.fixture
def loop(monkeypatch) -> ModuleType:
    # put back afterwards
    monkeypatch.setattr(
        start_client_internal, "_pull_and_store_message", start_client_internal._pull_and_store_message
    )
    return start_client_internal


def test_a_message_whose_run_ended_leaves_nothing_behind(loop):
    drop_whole(loop)
    state, store, message = receive_of_an_ended_run(loop)
    assert store.get(message) is None and not state.get_messages_legacy()
    assert not state.get_tasks(statuses=["pending"]) and state.get_tasks()


def test_flower_still_leaves_the_task_behind(loop):
    """When this fails, Flower has mended it and `drop_whole` can go."""
    state, store, message = receive_of_an_ended_run(loop)
    assert state.get_tasks(statuses=["pending"])
    assert store.get(message) == b""  # for ever "not yet available"
