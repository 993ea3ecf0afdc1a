"""Who is here: devices are offered the job when they come, and may be drawn once they have
said that they are ready.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedtune.bundles.bundle import Bundle
from fedtune.bundles.offer import Offer, OfferAnswer, class_of
from fedtune.errors import Refused
from fedtune.job import DeviceClass
from fedtune.process.waits import ASK_AGAIN_SECONDS, OFFER_SECONDS
from fedtune.server.app import short
from fedtune.server.superlink import SuperLink
from fedtune.types import ClientInfo
from fedtune.wire import RECORD


@dataclass
class Guest:
    """A device that came. `state` is "asked", or what it answered last."""

    node: int
    name: str
    joined: str
    state: str = "asked"
    reason: str = ""
    examples: int = 0
    held_out: int = 0
    kind: str = ""
    online: bool = True
    question: str = ""
    shipped: bool = False
    asked_at: float = 0.0


class Lobby:
    """The devices of one job.

    `names` gives the devices that are let in, by node id; None lets all in,
    under the name that they give themselves.
    """

    def __init__(
        self,
        link: SuperLink,
        grid: Grid,
        bundle: Bundle,
        names: Callable[[], Mapping[int, str]] | None,
        changed: Callable[[Guest], None],
        sent: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._link, self._grid, self._bundle, self._names, self._changed = link, grid, bundle, names, changed
        self._sent = sent
        self.guests: dict[int, Guest] = {}
        self._salt = secrets.token_hex(16)

    def visit(self) -> None:
        """Offers the job to devices that came or came back, and takes in their answers. Never waits."""
        online, names = self._link.online(), None if self._names is None else self._names()
        if names is not None:
            self.guests = {node: guest for node, guest in self.guests.items() if node in names}
        for node, joined in online.items():
            if names is None or node in names:
                self._greet(node, joined, f"node-{node:016x}"[:13] if names is None else names[node])
        for guest in self.guests.values():
            guest.online = guest.node in online
        self._hear()

    def ready(self) -> tuple[ClientInfo, ...]:
        """The devices that can be drawn now, by name."""
        found = [
            ClientInfo(g.name, g.examples) for g in self.guests.values() if g.online and g.state == "ready"
        ]
        return tuple(sorted(found, key=lambda info: info.name))

    def nodes(self, names: list[str]) -> list[int | None]:
        """The node of each device; None for one that is not ready any more,
        as devices come and go while a probe is answered.
        """
        known = self._by_name()
        return [known[name].node if name in known else None for name in names]

    def device(self, name: str) -> DeviceClass | None:
        """The class of the job's devices that this one says it is of; None where it says none."""
        guest = self._by_name().get(name)
        return class_of(self._bundle.job, "" if guest is None else guest.kind)

    def _by_name(self) -> dict[str, Guest]:
        """Those that are ready.

        A device without a key comes back as another node under its old name:
        then the one that is online counts.
        """
        return {g.name: g for g in sorted(self.guests.values(), key=lambda g: g.online) if g.state == "ready"}

    def _greet(self, node: int, joined: str, name: str) -> None:
        guest = self.guests.get(node)
        if guest is None or guest.joined != joined:
            guest = self.guests[node] = Guest(node, name if guest is None else guest.name, joined)
            self._offer(guest, {})
            self._changed(guest)
        elif guest.state != "ready" and time.monotonic() - guest.asked_at > (
            OFFER_SECONDS if guest.question else ASK_AGAIN_SECONDS
        ):
            self._offer(guest, {})

    def _offer(self, guest: Guest, files: Mapping[str, bytes]) -> None:
        """Flower stores equal offers once, under their hash; the salt is another when a
        device has spoilt that name.
        """
        content = RecordDict(
            {RECORD: ConfigRecord({**Offer(self._bundle.digest, files).dump(), "salt": self._salt})}
        )
        sent = list(
            self._grid.push_messages(
                [Message(content, guest.node, "query", ttl=OFFER_SECONDS, group_id="offer")]
            )
        )
        guest.shipped = bool(files)
        # the frame counts in its first round
        self._sent(64 + sum(map(len, files.values())) - (self._bundle.frame_bytes if files else 0))
        guest.question, guest.asked_at = (sent[0] or "") if sent else "", time.monotonic()
        if not guest.question:
            self._salt = secrets.token_hex(16)

    def _hear(self) -> None:
        asked = {g.question: g for g in self.guests.values() if g.question}
        for message in self._grid.pull_messages(list(asked)) if asked else ():
            guest = asked[message.metadata.reply_to_message_id]
            guest.question = ""
            # it left before it answered
            if message.has_error() and message.error.code == ErrorCode.NODE_UNAVAILABLE:
                guest.reason = short(message.error.reason)
                continue
            answer = _answer(message)
            if answer.state == "need" and not guest.shipped:
                self._offer(guest, self._bundle.shipped())
                continue
            if answer.state == "need":
                answer = OfferAnswer("refused", "asked for the bundle again after it was sent")
            try:
                class_of(self._bundle.job, answer.kind)
            except Refused as e:
                answer = OfferAnswer("refused", str(e), answer.name)
            guest.state, guest.reason, guest.examples, guest.held_out, guest.kind = (
                answer.state,
                answer.reason,
                answer.examples,
                answer.held_out,
                answer.kind,
            )
            if self._names is None and answer.name:
                guest.name = self._unique(answer.name, guest)
            self._changed(guest)

    def _unique(self, name: str, guest: Guest) -> str:
        taken = {g.name for g in self.guests.values() if g is not guest and g.online}
        return name if name not in taken else f"{name}-{guest.node:016x}"[:64]


def _answer(message: Message) -> OfferAnswer:
    """What a device answered; anything else is a refusal with its reason."""
    if message.has_error():
        return OfferAnswer("refused", short(message.error.reason) or "no answer")
    record = message.content.get(RECORD)
    values = dict(record) if isinstance(record, ConfigRecord) else {}
    if isinstance(values.get("refused"), str):
        return OfferAnswer("refused", short(str(values["refused"])))
    try:
        return OfferAnswer.load(values)
    except Refused as e:
        return OfferAnswer("refused", str(e))
