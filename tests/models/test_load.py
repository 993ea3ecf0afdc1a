"""Opening a base: the same every time, and refused where weights or places would have to be made up."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtune.errors import ModelError
from fedtune.job import ModelSection
from fedtune.models.base import layout
from fedtune.models.load import load_model, sketch_model
from fedtune.models.sources import locate


@pytest.fixture
def altered(tiny_bert, tmp_path):
    """altered(keep, **config) -> section of a copy of the tiny BERT without the tensors that `keep` turns down."""

    def make(keep=lambda name: True, **config):
        folder = shutil.copytree(tiny_bert, tmp_path / "altered")
        tensors = load_file(folder / "model.safetensors")
        save_file({name: t for name, t in tensors.items() if keep(name)}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
        return ModelSection(source=str(folder), max_length=16)

    return make


@pytest.mark.parametrize("base, task", [("tiny_bert", "text-classification"), ("tiny_gpt2", "causal-lm"), ("tiny_llama", "causal-lm")])
def test_a_sketch_has_the_layout_of_the_base(base, task, request):
    section = ModelSection(source=str(request.getfixturevalue(base)), task=task, max_length=16)
    source = locate(section.source)
    assert layout(sketch_model(section, source, 3)) == layout(load_model(section, source, 3, 0))


def test_a_base_is_frozen_without_dropout_and_its_head_comes_from_the_seed(altered):
    section = altered()
    one, two, other = (load_model(section, locate(section.source), 2, seed) for seed in (0, 0, 1))
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    assert torch.equal(one.head.weight, two.head.weight) and not torch.equal(one.head.weight, other.head.weight)


def test_a_missing_pooler_is_alike_each_time(altered):
    section = altered(lambda name: not name.startswith("pooler."))
    one, two = (load_model(section, locate(section.source), 2, 0).body.pooler.dense.weight for _ in range(2))
    assert torch.equal(one, two)


def test_missing_weights_are_not_made_up(altered):
    section = altered(lambda name: "layer.1." not in name)
    with pytest.raises(ModelError, match=r"its weights lack 16 tensors of AutoModel \(first encoder\.layer\.1\.attention\."):
        load_model(section, locate(section.source), 2, 0)


def test_code_of_a_base_is_never_run(altered):
    section = altered(auto_map={"AutoModel": "evil.Model"})
    for open_ in (lambda: sketch_model(section, locate(section.source), 2), lambda: load_model(section, locate(section.source), 2, 0)):
        with pytest.raises(ModelError, match="which fedtune never runs"):
            open_()


def test_texts_longer_than_the_positions_are_refused_early(tiny_bert, tiny_llama, tmp_path):
    source = locate(str(tiny_bert))
    assert sketch_model(ModelSection(max_length=32), source, 2) is not None
    with pytest.raises(ModelError, match=r"model\.max-length = 33: this base reads at most 32 tokens"):
        sketch_model(ModelSection(max_length=33), source, 2)
    assert sketch_model(ModelSection(max_length=64, task="causal-lm"), locate(str(tiny_llama)), 1) is not None  # rotary: no table


def test_roberta_counts_its_positions_from_its_padding_place(tmp_path):
    from transformers import RobertaConfig

    RobertaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, max_position_embeddings=34).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="at most 32 tokens"):
        sketch_model(ModelSection(max_length=33), locate(str(tmp_path)), 2)
