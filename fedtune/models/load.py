"""Loads a base as a TunableModel: from Hugging Face files (safetensors only,
no remote code) or from a packaged CNN.
"""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.common.seeds import generator
from fedtune.data.encoded import Encoder
from fedtune.data.images import ImageEncoder
from fedtune.data.text import TextEncoder
from fedtune.errors import FedtuneError, ModelError
from fedtune.job import ModelSection
from fedtune.models.base import TunableModel
from fedtune.models.sources import Source, read_config
from fedtune.tasks import Inputs, Task, task_named
from fedtune.tasks.images import IMAGES
from fedtune.tasks.texts import TEXT_CLASSIFICATION, TEXTS

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_SEES_BOTH_SIDES = ("bert-generation", "xlnet")  # encoders without a masked-LM class in transformers


def load_model(section: ModelSection, source: Source, classes: int, seed: int) -> TunableModel:
    """The base with its weights, frozen, in eval mode (dropout off), and a fresh head drawn from the seed.

    Raises ModelError: weights missing, not safetensors, broken, of another architecture,
    or in need of remote code.
    """
    if not source.weights:
        raise ModelError(
            f"model.source = {source.name!r}: no .safetensors weights in {source.folder}; "
            "convert pickled weights with save_pretrained(safe_serialization=True)"
        )
    task = task_named(section.task)
    body = _BODIES[task.inputs](task, source)(source, True)
    _finite(body, source)
    return _finish(body, task, section, classes, seed)


def sketch_model(section: ModelSection, source: Source, classes: int) -> TunableModel:
    """The same model without weights (meta device): names and shapes for `plan`. Needs only the config."""
    task = task_named(section.task)
    with torch.device("meta"):
        return _finish(_BODIES[task.inputs](task, source)(source, False), task, section, classes, 0)


def load_encoder(section: ModelSection, source: Source) -> Encoder:
    """What turns texts or image files into the model's inputs.

    Raises ModelError for a tokenizer that is not this base's.
    """
    return _ENCODERS[task_named(section.task).inputs](section, source)


def _text_encoder(section: ModelSection, source: Source) -> Encoder:
    room = read_config(source).get("vocab_size")
    encoder = TextEncoder.from_folder(source.folder, section.max_length)
    if isinstance(room, int) and encoder.vocabulary > room:
        raise ModelError(
            f"model.source = {source.name!r}: its tokenizer has {encoder.vocabulary} tokens, "
            f"its config.json names {room} (vocab_size); use the tokenizer that was saved with this base"
        )
    return encoder


_ENCODERS: Mapping[Inputs, Callable[[ModelSection, Source], Encoder]] = {
    TEXTS: _text_encoder,
    IMAGES: lambda section, _: ImageEncoder(section.image_size),
}
_Loader = Callable[[Source, bool], nn.Module]


def _text_body(task: Task, source: Source) -> _Loader:
    return _auto("AutoModel" if task.has_head else "AutoModelForCausalLM")


def _image_body(task: Task, source: Source) -> _Loader:
    if not source.name.startswith("package:") or not any(
        "efficientnet-lite0" in p.name for p in source.weights
    ):
        raise ModelError(
            f"model.source = {source.name!r}: for {task.name} only {IMAGES.base} is available yet"
        )
    return _efficientnet_lite0


_BODIES: Mapping[Inputs, Callable[[Task, Source], _Loader]] = {TEXTS: _text_body, IMAGES: _image_body}
"""What opens the body of a base, from a source and whether with its weights."""


def _finish(body: nn.Module, task: Task, section: ModelSection, classes: int, seed: int) -> TunableModel:
    _long_enough(body, section)
    head = None
    if task.has_head:
        width = _width(body)
        head = nn.Linear(width, classes)
        if head.weight.device.type != "meta":
            with torch.no_grad():
                draw = generator(seed, "head").standard_normal((classes, width)) / math.sqrt(width)
                head.weight.copy_(torch.from_numpy(draw.astype(np.float32)))
                head.bias.zero_()
    model = TunableModel(body, task, head, section.pooling).eval()
    return model.requires_grad_(False)


def _long_enough(body: nn.Module, section: ModelSection) -> None:
    """Raises ModelError when max-length is more than a table of learned positions has room for."""
    for name, m in body.named_modules():
        if isinstance(m, nn.Embedding) and name.rpartition(".")[2] in (
            "position_embeddings",
            "wpe",
            "embed_positions",
        ):
            # RoBERTa counts from its padding place
            room = m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1)
            if section.max_length > room:
                raise ModelError(
                    f"model.max-length = {section.max_length}: this base reads "
                    f"at most {room} tokens; lower it"
                )


def _finite(body: nn.Module, source: Source) -> None:
    for name, t in body.state_dict().items():
        if not torch.isfinite(t).all():
            raise ModelError(
                f"model.source = {source.name!r}: its weights {name} hold values that are not finite; "
                "download or save the base again"
            )


def _width(body: Any) -> int:
    if isinstance(body, _LiteBody):
        return body.width
    width = getattr(body.config, "hidden_size", None)
    if not isinstance(width, int):
        raise ModelError(
            f"model.source: {body.config.model_type} has no hidden_size, so it is no encoder "
            "of texts; use another base"
        )
    return width


def _auto(kind: str) -> _Loader:
    def load(source: Source, weights: bool) -> nn.Module:
        import transformers

        read_config(source)
        auto = getattr(transformers, kind)
        try:
            with _quiet():
                config = transformers.AutoConfig.from_pretrained(
                    source.folder, trust_remote_code=False, local_files_only=True
                )
                _suits(source, kind, config)
                if weights:
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(0)  # a pooler that the file lacks is drawn: alike in every process
                        model, report = auto.from_pretrained(
                            source.folder,
                            use_safetensors=True,
                            trust_remote_code=False,
                            local_files_only=True,
                            dtype=torch.float32,
                            output_loading_info=True,
                        )
                    _complete(source, kind, report["missing_keys"])
                else:
                    model = auto.from_config(config, trust_remote_code=False)
                # keys and values of tokens before: nothing here writes token by token
                model.config.use_cache = False
                return model
        except FedtuneError:
            raise
        # a wrong value in config.json or a cut file can end in any error inside transformers
        except Exception as e:
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            raise ModelError(
                f"model.source = {source.name!r}: transformers cannot open it as {kind}: {reason}"
            ) from None

    return load


def _suits(source: Source, kind: str, config: Any) -> None:
    """Raises ModelError for an architecture that the task cannot use. Needs no weights."""
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"model.source = {source.name!r}: {config.model_type} is an encoder-decoder, "
            "which fedtune cannot train; use an encoder or a causal-lm"
        )
    if (
        kind != "AutoModelForCausalLM"
        or getattr(config, "is_decoder", False)
        or getattr(config, "causal", False)
    ):
        return
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING or config.model_type in _SEES_BOTH_SIDES:
        raise ModelError(
            f"model.source = {source.name!r}: {config.model_type} reads a text in both directions, "
            "so each token would see the one it "
            f'predicts; use a causal base, or model.task = "{TEXT_CLASSIFICATION.name}"'
        )


def _complete(source: Source, kind: str, missing: Iterable[str]) -> None:
    """Raises ModelError when weights would be made up. A pooler may be: nothing here reads it."""
    needed = sorted(name for name in missing if not name.startswith("pooler."))
    if needed:
        raise ModelError(
            f"model.source = {source.name!r}: its weights lack {len(needed)} tensors of {kind} (first "
            f"{needed[0]}); use a base saved for this task"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides transformers' progress bar and load report while a base is opened; both are restored."""
    from transformers.utils import logging as hf

    level, bar = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(logging.ERROR)
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(level)
        if bar:
            hf.enable_progress_bar()


class _LiteBody(nn.Module):
    """EfficientNet-Lite0 up to its pooled features: pixels [n, 3, s, s] -> [n, 1280]."""

    width = 1280

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network.extract_features(pixels).mean((2, 3))


def _efficientnet_lite0(source: Source, weights: bool) -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError:
        raise ModelError(
            "efficientnet-lite0 needs the package efficientnet-lite-pytorch; install fedtune[client]"
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0")
    if weights:
        network.load_state_dict(_state_dict(source.weights[0]))
    del network._fc
    return _LiteBody(network)


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)  # weights_only: tensors, no pickled code
