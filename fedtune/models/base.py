"""The one shape that every base takes: a frozen body, a pooling, and a task head."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from fedtune.models.inverted import inverted_blocks
from fedtune.models.layout import Layout, Linear
from fedtune.models.losses import LOSSES, Loss, Scores
from fedtune.tasks import Task
from fedtune.types import TensorSpec


class TunableModel(nn.Module):
    """body -> vector per example -> head.

    forward takes the encoder's batch as keywords and returns logits: [batch, classes], or [batch, length,
    vocabulary] for a causal language model, which has no head of ours.
    """

    def __init__(
        self,
        body: nn.Module,
        task: Task,
        head: nn.Linear | None,
        pooling: str = "mean",
        losses: Loss | None = None,
    ) -> None:
        """losses: of a task whose loss is not one of ours; else found by what the task predicts."""
        super().__init__()
        self.body, self.task, self.head, self.pooling = body, task, head, pooling
        self.losses = LOSSES[task.targets] if losses is None else losses

    def linear(self, name: str) -> nn.Linear:
        """The linear of the body that has this name."""
        found = self.body.get_submodule(name)
        assert isinstance(found, nn.Linear), name
        return found

    def features(self, **inputs: Tensor) -> Tensor:
        """[batch, width]: what the head sees."""
        if not self.task.inputs.has_length:
            return self.body(*inputs.values())
        hidden = self.body(**inputs).last_hidden_state
        if self.pooling == "first":
            return hidden[:, 0]
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    def forward(self, **inputs: Tensor) -> Tensor:
        if self.head is None:
            return self.body(**inputs).logits
        return self.head(self.features(**inputs))

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor], labels: Tensor) -> Scores:
        """What the task makes of `forward`'s logits: see `losses.Loss.by_example`."""
        return self.losses.by_example(logits, batch, labels)


def block_weights(model: TunableModel) -> dict[str, float]:
    """|w|^2 of the base's own parameters in each block, for a base without an adapter."""
    units, found = _Units(model.body), dict[str, float]()
    for name, p in model.body.named_parameters():
        if (unit := units.of(name)).startswith("block."):
            found[unit] = found.get(unit, 0.0) + float(p.detach().double().square().sum())
    return found


def layout(model: TunableModel) -> Layout:
    """Names and shapes of a base, also of one on the meta device. Names are relative to the body."""
    units = _Units(model.body)
    linears = tuple(
        Linear(name, units.short(name), m.out_features, m.in_features, units.of(name))
        for name, m in model.body.named_modules()
        if isinstance(m, nn.Linear)
    )
    parameters = tuple(
        TensorSpec(name, tuple(p.shape), units.of(name)) for name, p in model.body.named_parameters()
    )
    head = (
        ()
        if model.head is None
        else tuple(
            TensorSpec(f"head.{name}", tuple(p.shape), "head") for name, p in model.head.named_parameters()
        )
    )
    inverted = tuple(replace(block, unit=units.of(f"{block.name}.")) for block in inverted_blocks(model.body))
    return Layout(linears, parameters, head, inverted)


class _Units:
    """Places names of a body's modules and parameters in its blocks."""

    def __init__(self, body: nn.Module) -> None:
        self.prefix = block_list(body)

    def _split(self, name: str) -> tuple[str, str] | None:
        start = f"{self.prefix}."
        if not self.prefix or not name.startswith(start):
            return None
        index, _, rest = name[len(start) :].partition(".")
        return index, rest

    def of(self, name: str) -> str:
        split = self._split(name)
        return f"block.{split[0]}" if split else "outside"

    def short(self, name: str) -> str:
        split = self._split(name)
        return split[1] if split else name


def block_list(body: nn.Module) -> str:
    """Name of the list of blocks, found by structure: the ModuleList (or Sequential) of like children that
    holds the most parameters. "" without one.
    """
    lists = {
        name: m
        for name, m in body.named_modules()
        if isinstance(m, (nn.ModuleList, nn.Sequential)) and _alike(m)
    }
    return max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()), default="")


def _alike(modules: nn.Module) -> bool:
    children = list(modules.children())
    return (
        len(children) >= 2
        and len({type(c) for c in children}) == 1
        and any(True for _ in children[0].children())
    )
