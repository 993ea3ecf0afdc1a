"""Texts without padding: one after another in a single row, each attending to itself alone.

transformers lets a model's attention be chosen by name. Ours splits the row back into texts, so every other layer sees nothing but
real tokens. A batch is sorted by length: texts of equal length then form one unpadded attention call.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.models.base import TunableModel

_NAME = "fedtune-packed"
_STRANGE = ("position_bias", "softcap", "sliding_window", "s_aux")  # what our attention does not do


class NotPackable(Exception):
    """This base cannot run packed; it can run padded."""


class Packing:
    """How the texts of the row that runs now lie: text i has lengths[i] tokens; texts of equal length stand together."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.runs = tuple((length, len(list(same))) for length, same in groupby(self.lengths.tolist()))
        self.sizes = [length * count for length, count in self.runs]
        ends = np.cumsum(self.lengths)
        self.starts = torch.from_numpy(ends - self.lengths).to(device)
        self.positions = torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends - self.lengths, self.lengths)).to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
        """Scaled dot-product attention within each text. query, key, value [1, heads, tokens, width] -> [1, tokens, heads, width]."""
        parts = [x.transpose(1, 2)[0].split(self.sizes) for x in (query, key, value)]  # one split: its backward is one concatenation
        grouped = query.shape[1] != key.shape[1]
        outs = []
        for (length, count), *qkv in zip(self.runs, *parts):
            q, k, v = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in qkv)
            out = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal and length > 1, enable_gqa=grouped)
            outs.append(out.transpose(1, 2).reshape(count * length, *out.shape[1::2]))
        return torch.cat(outs)[None]


class PackedModel:
    """A text base that can be asked for packed rows, while `active`.

    Args:
        first: number of the first position: 0, or where the family counts from its padding place, that place plus one.
    """

    def __init__(self, model: TunableModel, first: int = 0) -> None:
        if model.task == "image-classification" or not hasattr(model.body, "config"):
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
        """rows: int64 [tokens] by input name -> last hidden states [tokens, width]; logits [tokens, vocabulary] for a causal-lm."""
        self._packing = packing
        kwargs: Any = {name: row[None] for name, row in rows.items()} | {"position_ids": packing.positions[None] + self.first}
        if self.model.task == "causal-lm":
            return self.model.body(**kwargs, use_cache=False).logits[0]
        return self.model.body(**kwargs).last_hidden_state[0]

    def pooled(self, hidden: Tensor, packing: Packing) -> Tensor:
        """[tokens, width] -> [texts, width]: what the head sees, as TunableModel.features has it."""
        if self.model.pooling == "first":
            return hidden.index_select(0, packing.starts)
        return torch.cat([part.view(count, length, -1).mean(1) for part, (length, count) in zip(hidden.split(packing.sizes), packing.runs)])

    def _attention(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
        if attention_mask is not None or any(kwargs.get(name) is not None for name in _STRANGE):
            raise NotPackable("its attention is of a kind that packed texts do not have")
        assert self._packing is not None
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return self._packing.attend(query, key, value, kwargs.get("scaling"), bool(causal)), None

