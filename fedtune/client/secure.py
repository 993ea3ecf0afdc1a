"""A device's part in secure sums: its vector of a round, made here from what the trainer returned, leaves
under masks and only once.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.algorithms.units import selected, tensors_of
from fedtune.bundles.bundle import Bundle
from fedtune.common.storage import private_folder, write_atomic
from fedtune.errors import Refused
from fedtune.privacy.contribution import Secure, secure_of
from fedtune.privacy.noise import noise_of
from fedtune.secagg import messages
from fedtune.secagg.client import ClientRound
from fedtune.secagg.messages import Kind
from fedtune.secagg.terms import session_of
from fedtune.wire import decode, kind_of, round_of


def is_question(packet: bytes) -> bool:
    """Whether this is a message of the protocol, and not a packet of the wire."""
    return packet[:4] == messages.MAGIC


@dataclass
class SecureWork:
    """Of one job. folder: this device's own. minimum: fewest clients whose sum it takes part in, where the
    job does not ask for more: its noise is sized for those. budget: blocks that this device trains, 0 for the
    job's. At most one round is open, in memory.
    """

    folder: Path
    bundle: Bundle
    minimum: int
    budget: int = 0
    _round: ClientRound | None = None
    _vector: np.ndarray | None = None

    def __post_init__(self) -> None:
        found = secure_of(self.bundle.job, self.bundle.schema)
        assert found is not None, "a job that sums in the clear"
        self.secure: Secure = found

    @property
    def file(self) -> Path:
        return self.folder / f"{self.bundle.digest[:16]}.round"

    def begin(self, packet: bytes) -> None:
        """Before the training of a round: writes that it was begun.

        Raises Refused for a round that was begun before, or is older than one.

        Sums over two cohorts that differ by this device would differ by its vector:
        so a round is never run twice, whoever asks.
        """
        self._round = self._vector = None
        if kind_of(packet) != "model":
            raise Refused(
                "secure-aggregation", "only trained models are summed; this asks for something else"
            )
        round, last = round_of(packet), self._last()
        if round <= last:
            raise Refused(
                "secure-aggregation",
                f"round {round}: this device has begun round {last} already, and begins none twice",
            )
        private_folder(self.folder)
        write_atomic(self.file, str(round).encode())

    def first(self, packet: bytes, update: bytes, client: str) -> bytes:
        """After the training: keeps the vector and answers with this round's keys.

        Raises Refused for packets that are not of the job, and for units that the job does not have this
        device train in this round: without noise what one client alone trains would be seen in the sum.
        """
        schema, round = self.bundle.schema, round_of(packet)
        model = decode(packet, schema, kinds=["model"], frame=self.bundle.frame_digest)
        if model.train != tensors_of(schema, selected(self.bundle.job, schema, round, self.budget)):
            raise Refused(
                "secure-aggregation",
                f"round {round}: the coordinator asks for other units than the job; nothing was sent",
            )
        trained = decode(update, schema, kinds=["update"], round=round, frame=self.bundle.frame_digest)
        terms = self.secure.terms(session_of(self.bundle.digest), round)
        self._vector = self.secure.vector(
            trained.arrays, trained.metrics, model.arrays, noise_of(self.bundle.job, round, client, "sum")
        )
        self._round = ClientRound(terms, minimum=max(self.minimum, self.secure.design.threshold))
        return self._round.keys(messages.ask_keys(terms))

    def answer(self, question: bytes) -> bytes:
        """The later stages. Raises Refused for a question that is not the next one of the open round."""
        kind, round = messages.kind_of(question), self._round
        if round is None:
            raise Refused("order", "no round is open on this device")
        if kind == Kind.NEIGHBOURS:
            return round.shares(question)
        if kind == Kind.INBOX and self._vector is not None:
            vector, self._vector = self._vector, None
            return round.masked(question, vector)
        if kind == Kind.SURVIVORS:
            return round.unmask(question)
        raise Refused("kind", f"{kind.name} is no question that is open")

    def _last(self) -> int:
        try:
            return int(self.file.read_text())
        except FileNotFoundError:
            return 0
        except (OSError, ValueError):
            raise Refused(
                "secure-aggregation",
                "this device cannot read which round it was in last; its owner can mend that",
            ) from None
