"""Opening a base: the same every time, and refused where weights or places would have to be made up."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtune.errors import ModelError
from fedtune.job import ModelSection
from fedtune.models.base import layout
from fedtune.models.load import load_encoder, load_model, sketch_model
from fedtune.models.sources import locate


@pytest.fixture
def altered(tiny_bert, tmp_path):
    """altered(keep, **config) -> section of a copy of the tiny BERT without the
    tensors that `keep` turns down.
    """

    def make(keep=lambda name: True, **config):
        folder = shutil.copytree(tiny_bert, tmp_path / "altered")
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {name: t for name, t in tensors.items() if keep(name)},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | config)
        )
        return ModelSection(source=str(folder), max_length=16)

    return make


@pytest.mark.parametrize(
    "base, task",
    [("tiny_bert", "text-classification"), ("tiny_gpt2", "causal-lm"), ("tiny_llama", "causal-lm")],
)
def test_a_sketch_has_the_layout_of_the_base(base, task, request):
    section = ModelSection(source=str(request.getfixturevalue(base)), task=task, max_length=16)
    source = locate(section.source)
    assert layout(sketch_model(section, source, 3)) == layout(load_model(section, source, 3, 0))


def test_a_base_is_frozen_without_dropout_and_its_head_comes_from_the_seed(altered):
    section = altered()
    one, two, other = (load_model(section, locate(section.source), 2, seed) for seed in (0, 0, 1))
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    assert torch.equal(one.head.weight, two.head.weight) and not torch.equal(
        one.head.weight, other.head.weight
    )


def test_a_missing_pooler_is_alike_each_time(altered):
    section = altered(lambda name: not name.startswith("pooler."))
    one, two = (load_model(section, locate(section.source), 2, 0).body.pooler.dense.weight for _ in range(2))
    assert torch.equal(one, two)


def test_missing_weights_are_not_made_up(altered):
    section = altered(lambda name: "layer.1." not in name)
    with pytest.raises(
        ModelError, match=r"its weights lack 16 tensors of AutoModel \(first encoder\.layer\.1\.attention\."
    ):
        load_model(section, locate(section.source), 2, 0)


def test_code_of_a_base_is_never_run(altered):
    section = altered(auto_map={"AutoModel": "evil.Model"})
    for open_ in (
        lambda: sketch_model(section, locate(section.source), 2),
        lambda: load_model(section, locate(section.source), 2, 0),
    ):
        with pytest.raises(ModelError, match="which fedtune never runs"):
            open_()


def test_texts_longer_than_the_positions_are_refused_early(tiny_bert, tiny_llama, tmp_path):
    source = locate(str(tiny_bert))
    assert sketch_model(ModelSection(max_length=32), source, 2) is not None
    with pytest.raises(ModelError, match=r"model\.max-length = 33: this base reads at most 32 tokens"):
        sketch_model(ModelSection(max_length=33), source, 2)
    # rotary: no table
    assert sketch_model(ModelSection(max_length=64, task="causal-lm"), locate(str(tiny_llama)), 1) is not None


def test_roberta_counts_its_positions_from_its_padding_place(tmp_path):
    from transformers import RobertaConfig

    RobertaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=34,
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="at most 32 tokens"):
        sketch_model(ModelSection(max_length=33), locate(str(tmp_path)), 2)


def opened_with_a_line(section, message, *opens):
    for open_ in opens:
        with pytest.raises(ModelError, match=message) as caught:
            open_(section, locate(section.source), 2)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def load(section, source, classes):
    return load_model(section, source, classes, 0)


def test_a_tokenizer_of_another_base_is_refused(altered):
    section = altered(vocab_size=20)
    with pytest.raises(
        ModelError, match=r"its tokenizer has 26 tokens, its config\.json names 20 \(vocab_size\)"
    ):
        load_encoder(section, locate(section.source))


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_llama", "tiny_gpt2", "minilm_folder"])
def test_a_tokenizer_of_its_own_is_taken(base, request):
    section = ModelSection(source=str(request.getfixturevalue(base)))
    assert load_encoder(section, locate(section.source)).vocabulary > 0


@pytest.mark.parametrize(
    "kind, task", [("T5", "text-classification"), ("Bart", "text-classification"), ("Bart", "causal-lm")]
)
def test_an_encoder_decoder_is_refused(kind, task, tmp_path):
    import transformers

    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    opened_with_a_line(
        ModelSection(source=str(tmp_path), task=task),
        f"{kind.lower()} is an encoder-decoder, which fedtune cannot train",
        sketch_model,
    )


@pytest.mark.parametrize(
    "kind, refused",
    [
        ("Bert", True),
        ("Roberta", True),
        ("XLNet", True),
        ("ModernBert", True),
        ("Qwen2", False),
        ("GPTNeoX", False),
    ],
)
def test_a_causal_lm_reads_in_one_direction(kind, refused, tmp_path):
    import transformers

    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    section = ModelSection(source=str(tmp_path), task="causal-lm", max_length=16)
    if refused:
        opened_with_a_line(section, "reads a text in both directions", sketch_model)
    else:
        assert sketch_model(section, locate(section.source), 1) is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": "wide"},
        {"num_hidden_layers": None},
        {"num_attention_heads": 0},
        {"model_type": 3},
        {"model_type": "none"},
        {"hidden_act": "none"},
    ],
    ids=str,
)
def test_a_config_of_wrong_values_is_one_line(altered, settings):
    opened_with_a_line(altered(**settings), "model.source = ", sketch_model, load)


def test_a_config_that_is_a_list_is_one_line(altered, tmp_path):
    section = altered()
    (tmp_path / "altered" / "config.json").write_text("[]")
    opened_with_a_line(section, r"config\.json: holds a list, not an object of settings", sketch_model, load)


def test_cut_weights_are_one_line(altered, tmp_path):
    section, path = altered(), tmp_path / "altered" / "model.safetensors"
    for kept in (0, 5, 500, path.stat().st_size - 4):
        path.write_bytes(path.read_bytes()[:kept])
        opened_with_a_line(section, "transformers cannot open it as AutoModel: ", load)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(altered, tmp_path, value):
    section, path = altered(), tmp_path / "altered" / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.0.output.dense.weight"][0, 0] = value
    save_file(tensors, path, {"format": "pt"})
    opened_with_a_line(
        section, r"its weights encoder\.layer\.0\.output\.dense\.weight hold values that are not finite", load
    )


def test_a_pickle_of_the_users_own_is_never_opened(tmp_path):
    (tmp_path / "efficientnet-lite0.pth").write_bytes(b"never read")
    for name in (str(tmp_path), f"hf:{tmp_path}"):
        with pytest.raises(
            ModelError, match=r"holds efficientnet-lite0\.pth, fedtune opens safetensors only"
        ):
            locate(name)
    (tmp_path / "config.json").write_text("{}")
    assert not locate(str(tmp_path)).weights
    (tmp_path / "efficientnet-lite0.safetensors").write_bytes(b"")
    opened_with_a_line(
        ModelSection(source=str(tmp_path), task="image-classification"),
        "only package:efficientnet-lite0",
        load,
    )
