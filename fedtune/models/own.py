"""A module of the caller's own as a base: its head, its blocks and its linears are found by structure.

The head is the `nn.Linear` whose result is the module's result, as a forward pass on a few examples shows;
what is below it is the body. Blocks are found as in every base (`models.base.block_list`).
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.common.trees import digest
from fedtune.errors import ModelError
from fedtune.models.base import TunableModel
from fedtune.tasks import Task

SOURCE = "own:"
"""What model.source begins with of a module that Python passed; then comes the name of its class."""


def wrapped(module: nn.Module, task: Task, example: np.ndarray, outputs: int) -> TunableModel:
    """A copy of the module as a base, frozen, in eval mode. The module given stays as it is.

    Args:
        example: a batch of at least two examples, [n, *shape].
        outputs: how many logits the task needs for an example.

    Raises ModelError of one line: a module that fails on the batch, whose result is not [n, outputs] and
    finite, whose weights are not finite float32, or whose result is not that of an `nn.Linear`.
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"model: is a {type(module).__name__}; give a torch.nn.Module")
    name, own = type(module).__name__, copy.deepcopy(module).eval().requires_grad_(False)
    _require_weights(name, own)
    linears = {path: m for path, m in own.named_modules() if isinstance(m, nn.Linear)}
    results = dict[str, Tensor]()
    hooks = [m.register_forward_hook(_noting(results, path)) for path, m in linears.items()]
    try:
        with torch.no_grad():
            found = own(torch.from_numpy(example))
    except Exception as e:  # whatever a module of the caller's own raises
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ModelError(
            f"model {name}: its forward pass fails on a batch {list(example.shape)} ({reason}); "
            "give a module that takes what the data holds as its one argument"
        ) from e
    finally:
        for hook in hooks:
            hook.remove()
    _require_result(name, found, len(example), outputs)
    head = next((path for path, result in results.items() if path and result is found), None)
    if head is None:
        raise ModelError(
            f"model {name}: its result is not that of an nn.Linear; let it end with one, the head"
        )
    parent, _, child = head.rpartition(".")
    setattr(own.get_submodule(parent), child, nn.Identity())
    return TunableModel(own, task, linears[head]).eval().requires_grad_(False)


def weights_digest(module: nn.Module) -> str:
    """What stands for the sha256 of a base's files: of the names and values of its state."""
    state = {name: t.detach().cpu().numpy() for name, t in module.state_dict().items()}
    return digest({name: np.ascontiguousarray(array) for name, array in state.items()})


def _noting(results: dict[str, Tensor], path: str) -> Callable[..., None]:
    def note(layer: nn.Module, given: Any, result: Tensor) -> None:
        results[path] = result

    return note


def _require_weights(name: str, module: nn.Module) -> None:
    for path, p in module.named_parameters():
        if p.dtype != torch.float32:
            kind = str(p.dtype).removeprefix("torch.")
            raise ModelError(
                f"model {name}: its weight {path} is {kind}; it should be float32: call module.float()"
            )
        if not torch.isfinite(p).all():
            raise ModelError(
                f"model {name}: its weight {path} holds a number that is not finite; load it again"
            )


def _require_result(name: str, found: Any, examples: int, outputs: int) -> None:
    if not isinstance(found, Tensor) or tuple(found.shape) != (examples, outputs):
        what = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ModelError(
            f"model {name}: its forward pass gives {what} for {examples} examples; it should give a tensor "
            f"[{examples}, {outputs}], a logit for each label"
        )
    if not torch.isfinite(found).all():
        raise ModelError(
            f"model {name}: its forward pass gives numbers that are not finite on "
            "the data; mend one of the two"
        )
