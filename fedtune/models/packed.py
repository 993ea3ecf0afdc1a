"""Texts without padding: one after another in a single row, each attending to itself alone.

transformers lets a model's attention be chosen by name. Ours splits the row back into texts, so every other
layer sees nothing but real tokens; attention alone brings texts of about one length together as a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.errors import ContractError
from fedtune.models.base import TunableModel

_NAME = "fedtune-packed"
_STRANGE = ("position_bias", "softcap", "sliding_window", "s_aux")  # what our attention does not do


class NotPackable(Exception):
    """This base cannot run packed; it can run padded."""


class Packing:
    """How the texts of the row that runs now lie: text i has lengths[i] tokens, and lengths ascend."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if np.any(np.diff(self.lengths) < 0):
            raise ContractError("packed texts must stand in order of length")
        ends = np.cumsum(self.lengths)
        self.tokens = int(ends[-1])
        self.starts = torch.from_numpy(ends - self.lengths).to(device)
        self.positions = torch.from_numpy(
            np.arange(self.tokens) - np.repeat(ends - self.lengths, self.lengths)
        ).to(device)
        self.groups = tuple(
            _Group(self.lengths[a:b], int(ends[a] - self.lengths[a]), device) for a, b in alike(self.lengths)
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        """Scaled dot-product attention within each text. query, key, value [1, heads, tokens,
        width] -> [1, tokens, heads, width].
        """
        shared = query.shape[1] // key.shape[1]  # of grouped-query attention
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if shared > 1:
            k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
        return _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), scale, causal, self.groups)[
            None
        ]


class _Group:
    """Neighbouring texts of about one length, as a batch: `n` texts of `length` places,
    those behind a text's end empty.

    Tokens `rows` of the row are theirs. `take` [n * length] is the token of each place (any, where it is
    empty), `back` the place of each token.
    """

    def __init__(self, lengths: np.ndarray, start: int, device: torch.device) -> None:
        self.n, self.length = len(lengths), int(lengths[-1])
        self.rows = slice(start, start + int(lengths.sum()))
        places = np.arange(self.length)
        filled = places < lengths[:, None]
        take = (np.cumsum(lengths) - lengths)[:, None] + np.minimum(places, lengths[:, None] - 1)
        self.take = torch.from_numpy((take + start).ravel()).to(device)
        self.back = torch.from_numpy(np.flatnonzero(filled.ravel())).to(device)
        self.filled = None if filled.all() else torch.from_numpy(filled).to(device)
        self.device = device

    def batch(self, x: Tensor) -> Tensor:
        """[tokens, heads, width] -> [n * heads, length, width]."""
        part = x[self.rows] if self.filled is None else x.index_select(0, self.take)
        return (
            part.view(self.n, self.length, *x.shape[1:]).transpose(1, 2).reshape(-1, self.length, x.shape[2])
        )

    def unbatch(self, x: Tensor, heads: int) -> Tensor:
        """[n * heads, length, width] -> [tokens of this group, heads, width]."""
        flat = x.view(self.n, heads, self.length, -1).transpose(1, 2).reshape(self.n * self.length, heads, -1)
        return flat if self.filled is None else flat.index_select(0, self.back)

    def mask(self, heads: int, causal: bool) -> Tensor:
        """What is added to the scores, to broadcast against [n * heads, length, length]:
        minus infinity where nobody may look.
        """
        if causal:  # nobody looks ahead, so nobody looks behind a text's end either
            return torch.full((self.length, self.length), -torch.inf, device=self.device).triu(1)
        if self.filled is None:
            return torch.zeros(1, device=self.device)
        empty = torch.zeros(self.filled.shape, device=self.device).masked_fill_(~self.filled, -torch.inf)
        return empty.repeat_interleave(heads, 0)[:, None]


def alike(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Stretches (from, to) of ascending lengths in which the scores of empty places are
    at most a quarter of all.
    """
    out, begin, total = [], 0, 0
    for i, n in enumerate(lengths.tolist()):
        if i > begin and n * n * (i + 1 - begin) > 4 / 3 * (total + n * n):
            out.append((begin, i))
            begin, total = i, 0
        total += n * n
    return [*out, (begin, len(lengths))]


class _Attention(torch.autograd.Function):
    """softmax(scale * Q K' + mask) V by groups, as batched products; q, k, v [tokens, heads,
    width] -> the same shape.

    Written out because torch's own attention is slow on texts this short: most of its time goes to other
    things than the products.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, groups: Sequence[_Group]
    ) -> Tensor:
        out, kept, heads = torch.empty_like(q), [], q.shape[1]
        for group in groups:
            qg, kg, vg = (group.batch(x) for x in (q, k, v))
            p = torch.baddbmm(
                group.mask(heads, causal).to(q.dtype), qg, kg.transpose(1, 2), alpha=scale
            ).softmax(-1)
            out[group.rows] = group.unbatch(p @ vg, heads)
            kept += [qg, kg, vg, p]
        ctx.save_for_backward(*kept)
        ctx.scale, ctx.groups = scale, groups
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dout = grads[0].contiguous()
        dq, dk, dv, heads = *(torch.empty_like(dout) for _ in range(3)), dout.shape[1]
        for i, group in enumerate(ctx.groups):
            q, k, v, p = ctx.saved_tensors[4 * i : 4 * i + 4]
            do = group.batch(dout)
            if group.filled is not None:  # empty places repeat a token, whose gradient must count once
                do = (
                    do.view(group.n, heads, group.length, -1).mul_(group.filled[:, None, :, None]).view_as(do)
                )
            ds = torch.ops.aten._softmax_backward_data(do @ v.transpose(1, 2), p, -1, p.dtype).mul_(ctx.scale)
            dv[group.rows] = group.unbatch(p.transpose(1, 2) @ do, heads)
            dq[group.rows] = group.unbatch(ds @ k, heads)
            dk[group.rows] = group.unbatch(ds.transpose(1, 2) @ q, heads)
        return dq, dk, dv, None, None, None


class PackedModel:
    """A text base that can be asked for packed rows, while `active`.

    Args:
        first: number of the first position: 0, or where the family counts from its padding
            place, that place plus one.
    """

    def __init__(self, model: TunableModel, first: int = 0) -> None:
        if not model.task.inputs.has_length or not hasattr(model.body, "config"):
            raise NotPackable("not a text model of transformers")
        self.model, self.first = model, first
        self._packing: Packing | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the body's attention is ours. Restored afterwards."""
        from transformers import AttentionInterface

        config: Any = self.model.body.config
        name = f"{_NAME}-{id(self)}"
        before = config._attn_implementation
        AttentionInterface.register(name, self._attention)
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = before
            AttentionInterface._global_mapping.pop(name, None)

    def run(self, rows: Mapping[str, Tensor], packing: Packing) -> Tensor:
        """rows: int64 [tokens] by input name -> last hidden states [tokens, width]; logits [tokens,
        vocabulary] for a base without a head of ours.
        """
        self._packing = packing
        kwargs: Any = {name: row[None] for name, row in rows.items()} | {
            "position_ids": packing.positions[None] + self.first
        }
        if self.model.head is None:
            return self.model.body(**kwargs, use_cache=False).logits[0]
        return self.model.body(**kwargs).last_hidden_state[0]

    def pooled(self, hidden: Tensor, packing: Packing) -> Tensor:
        """[tokens, width] -> [texts, width]: what the head sees, as TunableModel.features has it."""
        if self.model.pooling == "first":
            return hidden.index_select(0, packing.starts)
        text = torch.repeat_interleave(
            torch.arange(len(packing.lengths), device=hidden.device),
            torch.from_numpy(packing.lengths).to(hidden.device),
        )
        total = torch.zeros(
            len(packing.lengths), hidden.shape[1], dtype=hidden.dtype, device=hidden.device
        ).index_add(0, text, hidden)
        return total / torch.from_numpy(packing.lengths).to(hidden)[:, None]

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None or any(kwargs.get(name) is not None for name in _STRANGE):
            raise NotPackable("its attention is of a kind that packed texts do not have")
        assert self._packing is not None
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return self._packing.attend(query, key, value, scale, bool(causal)), None
