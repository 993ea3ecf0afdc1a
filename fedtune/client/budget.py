"""A device's own account of what leaves it, whatever the coordinator says:
written before the training, kept through restarts.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedtune.client.policy import refusing
from fedtune.common.storage import private_folder, write_atomic
from fedtune.errors import Refused
from fedtune.job import Job
from fedtune.privacy.account import OWN
from fedtune.privacy.plan import PrivacyPlan, plan_of
from fedtune.runs.ledger import Ledger
from fedtune.wire import kind_of, round_of


@dataclass(frozen=True)
class Budget:
    """Of one job.

    `folder` is this device's own; `name` the job's digest, the same for the bundles before and after a frame
    was made from gradients.
    """

    folder: Path
    name: str
    job: Job

    @cached_property
    def plan(self) -> PrivacyPlan | None:
        """Worked out here, not taken from the coordinator.

        Raises Refused for a job that promises more than its noise gives.
        """
        with refusing():
            return plan_of(self.job, 0)

    def charge(self, packet: bytes) -> bytes | None:
        """Writes the release that answering this packet will be to the ledger.

        Returns the answer, where the same packet was answered before:
        sending that again tells nothing new and costs nothing.

        Raises Refused when the job's rounds are used up.
        """
        if self.plan is None:
            return None
        first = self.plan.gradients([OWN]) if kind_of(packet) == "gradient-request" else None
        if kind_of(packet) != "model" and first is None:
            raise Refused("privacy", "only trained models are protected; this asks for something else")
        if (sent := self._sent(packet)) is not None:
            return sent
        private_folder(self.folder)
        ledger, note = Ledger(self.ledger), hashlib.sha256(packet).hexdigest()[:16]
        events = ledger.events()
        joined = sum(event.facts["release"] == "updates" for event in events)
        if first is not None and (joined or any(event.facts["note"] != note for event in events)):
            raise Refused(
                "privacy", "the gradient of the first step left this device before; the job pays for one"
            )
        if joined >= self.plan.rounds:
            raise Refused(
                "privacy",
                f"the budget of {self.plan.rounds} rounds (epsilon "
                f"{self.plan.reading().epsilon:.3g}) is spent on this device",
            )
        ledger.record(round_of(packet), (first or self.plan.release([OWN])).facts() | {"note": note})
        return None

    def keep(self, packet: bytes, answer: bytes) -> None:
        """For when the coordinator asks the same again, because it was restarted before the
        answer reached its disk.
        """
        if self.plan is not None:
            write_atomic(self.folder / f"{self.name[:16]}.answer", hashlib.sha256(packet).digest() + answer)

    @property
    def ledger(self) -> Path:
        return self.folder / f"{self.name[:16]}.sqlite"

    def _sent(self, packet: bytes) -> bytes | None:
        try:
            kept = (self.folder / f"{self.name[:16]}.answer").read_bytes()
        except OSError:
            return None
        return kept[32:] if kept[:32] == hashlib.sha256(packet).digest() else None
