"""What goes to clients and what comes back, whatever carries it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedtune.wire import Packet

Pairs = Sequence[tuple[str, bytes]]
"""(client, packet)."""


@dataclass(frozen=True)
class Reply:
    """What came back from a client: a payload, or the reason there is none."""

    client: str
    payload: bytes | None
    error: str = ""
    late: bool = False
    """It answers a round that is over: counted, and not used."""
    packet: Packet | None = None
    size: int = 0
    """From an engine in this process: what the payload would have held, as read,
    and how long it would have been.
    """

    @property
    def length(self) -> int:
        """Bytes that came, or would have."""
        return self.size or len(self.payload or b"")


Exchange = Callable[..., Iterator[Reply]]
"""(pairs, kind="train", round=0) -> replies, as every engine answers."""
