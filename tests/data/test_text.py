"""Texts as tokens: the same numbers as transformers gives, from the file alone."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedtune.data.text import TextEncoder
from fedtune.errors import ContractError, ModelError

TEXTS = [
    "The picture is sharp.",
    "",
    "Zürich & 東京 — naïve café :-)",
    "word " * 300,
    "[MASK] unaffable Antidisestablishmentarianism\n\ttabs",
]


@pytest.fixture(scope="module")
def encoder(minilm_folder) -> TextEncoder:
    return TextEncoder.from_folder(minilm_folder, 64)


@pytest.mark.parametrize("max_length", [4, 64, 300])
def test_equal_to_transformers(minilm_folder, max_length):
    ours = TextEncoder.from_folder(minilm_folder, max_length)
    reference = AutoTokenizer.from_pretrained(minilm_folder)
    theirs = reference(TEXTS, truncation=True, max_length=max_length, padding="longest", return_tensors="np")
    batch = ours.collate(ours.encode(TEXTS))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    for name, array in batch.items():
        assert array.dtype == np.int64
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_encode_cuts_and_does_not_pad(encoder):
    encoded = encoder.encode(TEXTS)
    assert [len(one["input_ids"]) for one in encoded][1::2] == [2, 64]
    assert encoded[3]["input_ids"][-1] == encoder.tokenizer.token_to_id("[SEP]")


def test_a_batch_is_as_long_as_its_longest(encoder):
    batch = encoder.collate(encoder.encode(["one", "one two three"]))
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["input_ids"][0, 3:].tolist() == [encoder.pad_id] * 2
    with pytest.raises(ContractError, match="at least one text"):
        encoder.collate([])


def test_without_type_ids(encoder):
    plain = TextEncoder(encoder.tokenizer, 64, encoder.pad_id, needs_type_ids=False)
    assert set(plain.collate(plain.encode(["a"]))) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("types", [True, False])
def test_saved_and_read_again(encoder, tmp_path, types):
    saved = TextEncoder(encoder.tokenizer, 64, encoder.pad_id, needs_type_ids=types)
    saved.save(tmp_path)
    again = TextEncoder.from_folder(tmp_path, 64)
    assert (
        again.to_config()
        == saved.to_config()
        == {"kind": "text", "max_length": 64, "pad_id": 0, "needs_type_ids": types}
    )
    first, second = saved.collate(saved.encode(TEXTS)), again.collate(again.encode(TEXTS))
    theirs = AutoTokenizer.from_pretrained(tmp_path)(
        TEXTS, truncation=True, padding="longest", return_tensors="np"
    )
    assert set(first) == set(second) == set(theirs)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_array_equal(first[name], theirs[name])


def test_pads_with_the_end_token_when_there_is_no_other(encoder, tmp_path):
    encoder.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": None, "eos_token": {"content": "[SEP]"}})
    )
    found = TextEncoder.from_folder(tmp_path, 8)
    assert found.pad_id == encoder.tokenizer.token_to_id("[SEP]")
    assert not found.needs_type_ids


def test_folders_that_hold_no_tokenizer(encoder, tmp_path):
    with pytest.raises(
        ModelError, match=r"no tokenizer.json; save the tokenizer there with transformers' save_pretrained"
    ):
        TextEncoder.from_folder(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text('{"not": "one"}')
    with pytest.raises(ModelError, match=r"tokenizer.json: not a readable tokenizer \("):
        TextEncoder.from_folder(tmp_path, 8)
    encoder.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config.json: not readable JSON"):
        TextEncoder.from_folder(tmp_path, 8)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no pad_token or eos_token that the tokenizer knows"):
        TextEncoder.from_folder(tmp_path, 8)
