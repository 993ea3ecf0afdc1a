"""Texts as token arrays, with the tokenizer file that comes with the model.

No torch, no transformers: devices run this.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fedtune.errors import ContractError, ModelError

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
# texts tokenized together for their lengths alone: a text's encoding is kilobytes while it lives
_AT_ONCE = 1024


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer with the length texts are cut to.

    Attributes:
        tokenizer: its own padding and truncation settings are replaced; padding is done per batch.
        max_length: tokens kept of each text, special tokens included.
        pad_id: token id that fills short rows.
        needs_type_ids: the model has token types (BERT), so batches carry `token_type_ids`.
    """

    tokenizer: Tokenizer
    max_length: int
    pad_id: int
    needs_type_ids: bool

    def __post_init__(self) -> None:
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_length)

    @property
    def vocabulary(self) -> int:
        """Rows an embedding needs: the largest token id, and one."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, texts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """One {"input_ids": int64 [length]} per text, length at most max_length;
        with "token_type_ids" if needed.
        """
        return [self._arrays(encoding) for encoding in self.tokenizer.encode_batch(list(texts))]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as `encode` gives it."""
        starts = range(0, len(texts), _AT_ONCE)
        return [
            len(encoding.ids)
            for start in starts
            for encoding in self.tokenizer.encode_batch(list(texts[start : start + _AT_ONCE]))
        ]

    def collate(self, encoded: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Pads to the longest of the batch.

        Returns:
            "input_ids" and "attention_mask", int64 [n, longest], and "token_type_ids" if needed. Padding is
            on the right, with mask 0.

        Raises:
            ContractError: no texts.
        """
        if not encoded:
            raise ContractError("a batch needs at least one text")
        lengths = np.array([len(one["input_ids"]) for one in encoded])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        batch = {
            "input_ids": _padded([one["input_ids"] for one in encoded], mask, self.pad_id),
            "attention_mask": mask,
        }
        if self.needs_type_ids:
            batch["token_type_ids"] = _padded([one["token_type_ids"] for one in encoded], mask, 0)
        return batch

    def made_up(self, lengths: Sequence[int], draw: np.random.Generator) -> list[dict[str, np.ndarray]]:
        """Encoded texts of so many tokens from the whole vocabulary."""
        types = [{"token_type_ids": np.zeros(n, np.int64)} if self.needs_type_ids else {} for n in lengths]
        return [
            {"input_ids": draw.integers(0, self.vocabulary, n), **kind} for n, kind in zip(lengths, types)
        ]

    def sides(self, lengths: Sequence[int]) -> Sequence[int]:
        """Tokens of each."""
        return lengths

    def span(self, tokens: int, images: int) -> int:
        """So many tokens."""
        return tokens

    def decode(self, place: int) -> str:
        """The token of this id, as text."""
        return self.tokenizer.decode([place], skip_special_tokens=False)

    def to_config(self) -> dict[str, Any]:
        """The settings beside the tokenizer itself, as plain values."""
        return {
            "kind": "text",
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "needs_type_ids": self.needs_type_ids,
        }

    @classmethod
    def from_folder(cls, folder: Path, max_length: int) -> "TextEncoder":
        """Reads a model folder: tokenizer.json, and the padding token from the files beside it.

        A model without a padding token (most causal ones) pads with its end token;
        the mask hides it either way.

        Raises:
            ModelError: no readable tokenizer.json, or neither a padding nor an end token.
        """
        tokenizer = _read_tokenizer(folder / _TOKENIZER)
        settings = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / _CONFIG)}
        return cls(tokenizer, max_length, _pad_id(tokenizer, settings, folder), _has_types(settings, folder))

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, from which `from_folder` and
        transformers make the same encoder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / _TOKENIZER))
        inputs = ["input_ids", *(["token_type_ids"] if self.needs_type_ids else []), "attention_mask"]
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_length,
            "pad_token": self.tokenizer.id_to_token(self.pad_id),
            "model_input_names": inputs,
        }
        (folder / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def _arrays(self, encoding: Any) -> dict[str, np.ndarray]:
        arrays = {"input_ids": np.array(encoding.ids, dtype=np.int64)}
        if self.needs_type_ids:
            arrays["token_type_ids"] = np.array(encoding.type_ids, dtype=np.int64)
        return arrays


def _padded(rows: Sequence[np.ndarray], mask: np.ndarray, fill: int) -> np.ndarray:
    out = np.full(mask.shape, fill, dtype=np.int64)
    out[mask.astype(bool)] = np.concatenate(rows)
    return out


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ModelError(
            f"{path.parent}: no {path.name}; save the tokenizer there with transformers' save_pretrained"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:  # the tokenizers library raises bare Exception for a bad file
        raise ModelError(
            f"{path}: not a readable tokenizer ({str(e)[:120]}); "
            "save it again with transformers' save_pretrained"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} without the file. Raises ModelError."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise ModelError(f"{path}: not readable JSON ({e}); save the tokenizer again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a JSON object; save the tokenizer again")
    return found


def _pad_id(tokenizer: Tokenizer, settings: dict[str, Any], folder: Path) -> int:
    for key in ("pad_token", "eos_token"):
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        place = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if place is not None:
            return int(place)
    raise ModelError(
        f"{folder}: names no pad_token or eos_token that the tokenizer knows; set pad_token in {_CONFIG}"
    )


def _has_types(settings: dict[str, Any], folder: Path) -> bool:
    """As the tokenizer says; older folders do not, then whether the model has more than one token type."""
    names = settings.get("model_input_names")
    if isinstance(names, list):
        return "token_type_ids" in names
    types = _read_json(folder / "config.json").get("type_vocab_size", 0)
    return isinstance(types, int) and types > 1
