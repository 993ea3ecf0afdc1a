"""A program that passes for four devices and answers with whatever might do harm.

The tests start it as a process.

    python -m hostile_device SERVER DEVICES BUNDLE GATE

mallory is a device as ours are, a SuperNode with an executor, but for the app that answers. trudy and oscar
speak the Fleet API themselves, with keys that are let in, and so can send what no SuperNode would. victor
does too, and never gets beyond the offer. The three say that they are ready when there is a file at GATE.
Each round they make their next attack, and say which; before the first and after the last one they answer as
a device should, with next to no weight.
"""

import contextlib
import hashlib
import json
import secrets
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Array, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedtune.bundles.bundle import Bundle, open_bundle
from fedtune.bundles.offer import Offer, OfferAnswer
from fedtune.client.app import make_device_app
from fedtune.client.connection import Unreachable, look
from fedtune.client.supernode import NodeSettings, SuperNode, execute
from fedtune.wire import RECORD, Schema, decode, encode

ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\n\u202e"
LONG = ESCAPES + "x" * 10_000 + ESCAPES + "the end"
HUGE = 50_000_000
ATTACKS = 10  # of each
BATCH = 0.2  # seconds between questions to the coordinator


@dataclass
class Asked:
    """What an attack works with: the model of this round, and the schema and frame that it belongs to."""

    bundle: Bundle
    packet: bytes

    @property
    def schema(self) -> Schema:
        return self.bundle.manifest.spec.schema

    @property
    def round(self) -> int:
        return self.model.header.round

    @property
    def model(self):
        return decode(self.packet, self.schema, kinds=["model"])

    def fair(self, weight: float = 1e-9) -> bytes:
        """An update that is taken and changes nothing."""
        return self.honest(weight=weight)

    def honest(self, **other: object) -> bytes:
        """An update that is taken: the model as it came."""
        facts = {"round": self.round, "frame": self.bundle.frame_digest, "weight": 30.0} | other
        return encode("update", self.schema, dict(self.model.arrays), **facts)  # type: ignore[arg-type]

    def with_first(self, number: float) -> bytes:
        """An update whose first number is this one."""
        arrays = dict(self.model.arrays)
        name = next(iter(arrays))
        arrays[name] = arrays[name].copy()
        arrays[name].flat[0] = number
        return encode(
            "update", self.schema, arrays, round=self.round, frame=self.bundle.frame_digest, weight=30.0
        )

    def forged(self, text: str = "", length: int | None = None, **header: object) -> bytes:
        """An update with these values in its header, which `encode` would not write, or with this header."""
        data = self.honest()
        (old,) = struct.unpack_from("<I", data, 4)
        new = (text or json.dumps(json.loads(data[8 : 8 + old]) | header)).encode()
        return data[:4] + struct.pack("<I", len(new) if length is None else length) + new + data[8 + old :]


def part(asked: Asked) -> bytes:
    arrays = dict(list(asked.model.arrays.items())[:-1])
    return encode(
        "update", asked.schema, arrays, round=asked.round, frame=asked.bundle.frame_digest, weight=30.0
    )


def packet(data: bytes) -> RecordDict:
    return RecordDict({RECORD: ConfigRecord({"packet": data})})


def answers(**values: object) -> RecordDict:
    return RecordDict({RECORD: ConfigRecord(values)})  # type: ignore[arg-type]


class Turns:
    """Which attack is due: the first in the round after all have been asked."""

    def __init__(self, gate: Path) -> None:
        self._gate = gate
        self._lock, self._asked = threading.Lock(), dict[str, int]()

    def due(self, name: str, round: int) -> int | None:
        with self._lock:
            self._asked.setdefault(name, round)
            number = round - max(self._asked.values()) - 1
            if len(self._asked) < len(LANES) or not 0 <= number < ATTACKS:
                return None
        print(f"{name}: round {round}: attack {number}", flush=True)
        return number

    def ready(self) -> None:
        while not self._gate.exists():
            time.sleep(BATCH)


Content = RecordDict | Error
APP: dict[str, tuple[Callable[[Asked], Content], str]] = {
    "another frame": (lambda asked: packet(asked.honest(frame="0" * 16)), "frame: "),
    "an extra tensor": (lambda asked: packet(asked.honest() + bytes(400)), "size: "),
    "a missing tensor": (lambda asked: packet(part(asked)), "tensors: "),
    "a negative weight": (lambda asked: packet(asked.forged(weight=-3)), "header: weight: "),
    "a weight of all": (lambda asked: packet(asked.honest(weight=1e12)), "weight: 1e+12 "),
    "a reply to round 1": (lambda asked: packet(asked.honest(round=1)), "round: reply to round 1, "),
    "a NaN": (lambda asked: packet(asked.with_first(float("nan"))), "not-finite: "),
    "far away": (lambda asked: packet(asked.with_first(1e30)), "norm: "),
    "a header of 4 GB": (
        lambda asked: packet(asked.forged(length=2**32 - 1)),
        "header: says 4294967295 bytes",
    ),
    "50 MB": (lambda asked: packet(bytes(HUGE)), "no reply"),
}


class Raw:
    """A device that speaks the Fleet API itself."""

    def __init__(self, server: str, folder: Path, bundle: Bundle) -> None:
        self.bundle, self.name = bundle, folder.name
        key = load_ssh_private_key((folder / "device.key").read_bytes(), None)
        self.public = public_key_to_bytes(key.public_key())  # type: ignore[arg-type]
        self.client = FleetHttpClient.from_server_address(
            server,
            False,
            str(folder / "ca.crt"),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )  # type: ignore[arg-type]
        self.node = Node()

    def again(self) -> None:
        """Comes; leaves before, if it was there."""
        if self.node.node_id:
            self.client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))
        self.node = Node(
            node_id=self.client.ActivateNode(
                ActivateNodeRequest(public_key=self.public, heartbeat_interval=30.0)
            ).node_id
        )

    def wait(self) -> Message:
        """The next message, when there is one."""
        while (found := self.question()) is None:
            time.sleep(BATCH)
        return found

    def question(self) -> Message | None:
        """The next message, or None. Tells the coordinator that it lives, too."""
        self.client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=30.0))
        found = self.client.PullMessages(PullMessagesRequest(node=self.node))
        if not found.messages_list:
            return None
        head, tree = message_from_proto(found.messages_list[0]), found.message_object_trees[0]
        parts: dict[str, bytes] = {}
        for name in [p.object_id for p in iterate_object_tree(tree)]:
            while not parts.get(name):  # the coordinator may not have stored all of it yet
                parts[name] = self.client.PullObject(
                    PullObjectRequest(node=self.node, run_id=head.metadata.run_id, object_id=name)
                ).object_content
        message = inflate_object_from_contents(tree.object_id, parts)
        self.client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self.node, run_id=head.metadata.run_id, message_object_id=tree.object_id
            )
        )
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def reply(self, question: Message, content: Content) -> bool:
        """As a SuperNode replies. Whether it was taken."""
        message = Message(content, reply_to=question)
        message.metadata.__dict__["_message_id"] = message.object_id
        return self.send(
            message_to_proto(message),
            get_object_tree(message),
            {name: o.deflate() for name, o in get_all_nested_objects(message).items()},
        )

    def send(self, head: ProtoMessage, tree: ObjectTree, parts: dict[str, bytes]) -> bool:
        """Announces a message and sends these parts of it. Whether it was taken."""
        taken = self.client.PushMessages(
            PushMessagesRequest(
                node=self.node,
                messages_list=[head],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
        )
        for name in taken.objects_to_push:
            if name in parts:
                self.client.PushObject(
                    PushObjectRequest(
                        node=self.node,
                        run_id=head.metadata.run_id,
                        object_id=name,
                        object_content=parts[name],
                        session_id=taken.session_id,
                    )
                )
        return bool(taken.objects_to_push)

    def head(self, question: Message, number: str) -> ProtoMessage:
        """What a reply says about itself, as the coordinator's database sees it."""
        head = message_to_proto(Message(RecordDict(), reply_to=question))
        head.metadata.message_id = number
        return head


def framed(kind: str, body: bytes, *children: str) -> tuple[str, bytes]:
    """A part as Flower stores it, of any content, and its name."""
    data = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
    return hashlib.sha256(data).hexdigest(), data


def only_a_record(raw: Raw, question: Message, asked: Asked) -> None:
    """The reply's root is no message."""
    record = packet(asked.honest())
    parts = {name: o.deflate() for name, o in get_all_nested_objects(record).items()}
    assert raw.send(raw.head(question, record.object_id), get_object_tree(record), parts)


def broken_record(raw: Raw, question: Message, asked: Asked) -> None:
    """The record in the reply cannot be read."""
    leaf, leaf_data = framed("ConfigRecord", secrets.token_bytes(200))
    names, data = framed("RecordDict", json.dumps({RECORD: leaf}).encode(), leaf)
    root, root_data = framed(
        "Message", ProtoMessage(metadata=raw.head(question, "").metadata).SerializeToString(), names
    )
    tree = ObjectTree(
        object_id=root, children=[ObjectTree(object_id=names, children=[ObjectTree(object_id=leaf)])]
    )
    assert raw.send(raw.head(question, root), tree, {leaf: leaf_data, names: data, root: root_data})


def empty_message(raw: Raw, question: Message, asked: Asked) -> None:
    """Neither content nor error."""
    root, data = framed("Message", ProtoMessage(metadata=raw.head(question, "").metadata).SerializeToString())
    assert raw.send(raw.head(question, root), ObjectTree(object_id=root), {root: data})


def array_for_records(raw: Raw, question: Message, asked: Asked) -> None:
    """The content is an array."""
    array = Array(np.zeros(3, np.float32))
    parts = {name: o.deflate() for name, o in get_all_nested_objects(array).items()}
    root, data = framed(
        "Message", ProtoMessage(metadata=raw.head(question, "").metadata).SerializeToString(), array.object_id
    )
    assert raw.send(
        raw.head(question, root),
        ObjectTree(object_id=root, children=[get_object_tree(array)]),
        parts | {root: data},
    )


def for_another_question(raw: Raw, question: Message, asked: Asked) -> None:
    """What the message says about itself differs from what was announced."""
    record = packet(asked.with_first(float("nan")))
    parts = {name: o.deflate() for name, o in get_all_nested_objects(record).items()}
    facts = raw.head(question, "").metadata
    facts.reply_to_message_id, facts.src_node_id = "f" * 64, 7
    root, data = framed("Message", ProtoMessage(metadata=facts).SerializeToString(), record.object_id)
    tree = ObjectTree(object_id=root, children=[get_object_tree(record)])
    assert raw.send(raw.head(question, root), tree, parts | {root: data})


def from_the_coordinator(raw: Raw, question: Message, asked: Asked) -> None:
    """Questions, replies and parts that are not its own: none is taken. Then a plain error."""
    for receiver in (SUPERLINK_NODE_ID, raw.node.node_id):
        message = Message(packet(b""), receiver, "train", ttl=60.0)
        message.metadata.__dict__ |= {"_run_id": question.metadata.run_id, "_src_node_id": SUPERLINK_NODE_ID}
        message.metadata.__dict__["_message_id"] = message.object_id
        assert not raw.send(message_to_proto(message), get_object_tree(message), {})
    head = raw.head(question, "a" * 64)
    head.metadata.src_node_id = 7
    assert not raw.send(head, ObjectTree(object_id="a" * 64), {})
    many = ObjectTree(object_id="b" * 64, children=[ObjectTree(object_id=f"{i:064x}") for i in range(5000)])
    assert not raw.send(raw.head(question, "b" * 64), many, {})
    assert raw.reply(question, Error(7, "  \n "))


def announced_only(raw: Raw, question: Message, asked: Asked) -> None:
    """The parts never come."""
    assert raw.send(
        raw.head(question, "c" * 64),
        ObjectTree(object_id="c" * 64, children=[ObjectTree(object_id="d" * 64)]),
        {},
    )


def sent(content: Callable[[Asked], Content]) -> Callable[[Raw, Message, Asked], None]:
    def send(raw: Raw, question: Message, asked: Asked) -> None:
        assert raw.reply(question, content(asked))

    return send


Attack = Callable[[Raw, Message, Asked], None]
FLEET: dict[str, tuple[Attack, str]] = {
    "only a record": (only_a_record, "failed: its reply is not a message"),
    "a broken record": (broken_record, "failed: its reply is not a message"),
    "an empty message": (empty_message, "failed: its reply is not a message"),
    "an array for records": (array_for_records, "failed: its reply is not a message"),
    "for another question": (for_another_question, "not-finite: "),
    "from the coordinator": (from_the_coordinator, "failed: error code 7"),
    "no record": (sent(lambda asked: RecordDict()), "failed: reply without a packet"),
    "an error of 10 kB": (sent(lambda asked: Error(7, LONG)), "failed: "),
    "a refusal of 10 kB": (sent(lambda asked: answers(refused=LONG)), "failed: "),
    "announced only": (announced_only, "no reply"),
}
MORE: dict[str, tuple[Attack, str]] = {
    "an infinity": (sent(lambda asked: packet(asked.with_first(float("-inf")))), "not-finite: "),
    "another schema": (sent(lambda asked: packet(asked.forged(schema_digest="0" * 16))), "schema: "),
    "an unknown tensor": (
        sent(lambda asked: packet(asked.forged(tensors=[0, 10**6]))),
        "tensors: index 1000000, ",
    ),
    "random bytes": (sent(lambda asked: packet(secrets.token_bytes(5000))), "magic: "),
    "nothing": (sent(lambda asked: packet(b"")), "size: 0 bytes"),
    "another record": (
        sent(lambda asked: RecordDict({RECORD: MetricRecord({"packet": 1.0})})),
        "failed: reply without a packet",
    ),
    "a packet of text": (sent(lambda asked: answers(packet="text")), "failed: reply without a packet"),
    "another kind": (sent(lambda asked: packet(asked.forged(kind="model"))), "kind: "),
    "a word for a number": (
        sent(lambda asked: packet(asked.forged('{"kind": "update", "round": NaN}'))),
        "header: ",
    ),
    "fewer numbers": (sent(lambda asked: packet(asked.honest()[:-4])), "size: "),
}
LANES = {"mallory": APP, "trudy": FLEET, "oscar": MORE}
assert {len(lane) for lane in LANES.values()} == {ATTACKS}


def mallory(server: str, folder: Path, bundle: Bundle, turns: Turns) -> None:
    """Through a SuperNode, with an app of its own."""
    attacks = list(APP.values())

    def accept(offer: Offer) -> OfferAnswer:
        turns.ready()
        return OfferAnswer("ready", "", "", 30, 10)

    known = make_device_app(
        accept,
        lambda job, packet, client: b"",
        lambda job, packet: Asked(bundle, packet).forged(kind="scores"),
    )

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type != "train":
            return known(message, context)
        asked = Asked(bundle, message.content[RECORD]["packet"])  # type: ignore[index, arg-type, call-overload]
        due = turns.due(folder.name, asked.round)
        return Message(packet(asked.fair()) if due is None else attacks[due][0](asked), reply_to=message)  # type: ignore[arg-type]

    node = SuperNode(NodeSettings(server, folder / "ca.crt", folder / "device.key", folder / "node"))
    execute(node, app, threading.Event())  # type: ignore[arg-type]
    node.stop()


def trudy(server: str, folder: Path, bundle: Bundle, turns: Turns) -> None:
    """Through the Fleet API, what no SuperNode sends."""
    raw, attacks = Raw(server, folder, bundle), list(LANES[folder.name].values())
    raw.again()
    while True:
        question = raw.wait()
        if question.metadata.message_type == "query":
            turns.ready()
            raw.reply(question, answers(state="ready", examples=30))
            continue
        asked = Asked(bundle, question.content[RECORD]["packet"])  # type: ignore[arg-type, call-overload]
        if question.metadata.message_type == "evaluate":
            raw.reply(question, packet(asked.forged(kind="scores", metrics={"loss": [1, "NaN"]})))
        elif (due := turns.due(raw.name, asked.round)) is not None:
            attacks[due][0](raw, question, asked)  # type: ignore[operator]
        else:
            first, second = (raw.reply(question, packet(asked.fair(weight))) for weight in (1e-9, 999.0))
            print(f"{raw.name}: first reply taken: {first}, second: {second}", flush=True)


VISITS: list[list[Content]] = [
    [answers(state="need"), answers(state="need")],
    [Error(7, LONG)],
    [Error(7, " \n")],
    [RecordDict()],
    [answers(refused=LONG)],
    [answers(state="owner")],
    [answers(state="ready", examples=-1)],
    [answers(state="ready", examples=30, name="../../etc")],
    [answers(state="refused", reason=LONG, name="books")],
]


def victor(server: str, folder: Path, bundle: Bundle, turns: Turns) -> None:
    """Never gets beyond the offer: comes again and again, as one that is started anew, and each time
    answers with other nonsense.
    """
    raw = Raw(server, folder, bundle)
    turns.ready()
    for visit in VISITS:
        raw.again()
        for answer in visit:
            question = raw.wait()
            assert raw.reply(question, answer)
        time.sleep(BATCH)
    raw.again()
    offer = raw.wait().content
    # the next offer would consist of parts of these names
    for number, name in enumerate((offer[RECORD].object_id, offer.object_id)):
        root = f"{number}" * 64
        tree = ObjectTree(
            object_id=root, children=[ObjectTree(object_id=name, children=[ObjectTree(object_id="9" * 64)])]
        )
        raw.again()
        print(
            f"{raw.name}: announced a part by another name: {raw.send(raw.head(raw.wait(), root), tree, {})}",
            flush=True,
        )
    raw.again()


def main(server: str, devices: str, bundle: str, gate: str) -> None:
    turns = Turns(Path(gate))
    while True:
        with contextlib.suppress(Unreachable):
            look(server, Path(devices) / "mallory" / "ca.crt")
            break
        time.sleep(BATCH)
    roles = {"mallory": mallory, "trudy": trudy, "oscar": trudy, "victor": victor}

    def play(name: str) -> None:
        with contextlib.suppress(httpx.TransportError):  # the coordinator is done
            roles[name](server, Path(devices) / name, open_bundle(Path(bundle)), turns)

    threads = [threading.Thread(target=play, args=(name,)) for name in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
