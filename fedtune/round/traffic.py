"""What a run's messages weigh."""

from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Bytes by client, as serialised, and who holds the frame.

    `down` counts the frame on a client's first round.
    """

    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    messages: int = 0
    late: int = 0
    evaluation: int = 0
    offers: int = 0
    """Bytes beside the rounds, live only: of evaluation, both ways,
    and of job offers and bundles without the frame.
    """
    probes: int = 0
    """Of `up` and `down`, what probes took."""

    def sent(self, client: str, size: int) -> None:
        self.messages += 1
        self.down[client] = self.down.get(client, 0) + size

    def received(self, client: str, size: int) -> None:
        self.messages += 1
        self.up[client] = self.up.get(client, 0) + size

    @property
    def total(self) -> int:
        return sum(self.up.values()) + sum(self.down.values())

    def dump(self) -> dict:
        return {
            "up": self.up,
            "down": self.down,
            "rounds": self.rounds,
            "messages": self.messages,
            "late": self.late,
            "evaluation": self.evaluation,
            "offers": self.offers,
            "probes": self.probes,
        }
