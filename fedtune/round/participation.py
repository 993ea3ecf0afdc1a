"""Who has been in how many rounds, where privacy limits it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedtune.types import Assignment


@dataclass
class Participation:
    """Rounds that each client was asked in, as the ledger has them, against its budget.

    Attributes:
        most: the budget in rounds; 0: none.
        joined: rounds by client.
        aborted: whom the next round had asked when the process before this one ended.
        spent: of the round under way: those drawn who are not asked, as their budget is spent.
    """

    most: int = 0
    joined: Counter[str] = field(default_factory=Counter)
    aborted: Sequence[list[str]] = ()
    spent: tuple[str, ...] = ()

    def admit(self, drawn: Sequence[Assignment]) -> list[Assignment]:
        """Those of a round who may be asked."""
        admitted = self._within_budget(drawn)
        # who was asked then may have answered: that counts, too
        if self.aborted and sorted(a.client for a in admitted) not in self.aborted:
            self.joined.update(name for names in self.aborted for name in names)
            admitted = self._within_budget(drawn)
        self.aborted = ()
        return admitted

    def count(self, admitted: Sequence[Assignment]) -> None:
        """These are asked in this round."""
        self.joined.update(a.client for a in admitted)

    def refusals(self) -> dict[str, str]:
        """Why those whose budget is spent are not in the round."""
        return {name: f"privacy: its budget of {self.most} rounds is spent" for name in self.spent}

    def _within_budget(self, drawn: Sequence[Assignment]) -> list[Assignment]:
        self.spent = tuple(a.client for a in drawn if self.most and self.joined[a.client] >= self.most)
        return [a for a in drawn if a.client not in self.spent]
