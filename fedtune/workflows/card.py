"""The model card of a run: README.md with front matter as model hubs read it,
and nothing in it that was not measured.
"""

import json
from pathlib import Path
from typing import Any

from fedtune.bundles.bundle import Bundle, Manifest
from fedtune.job import ModelSection
from fedtune.report.format import count, number, size, small
from fedtune.report.privacy import Privacy, claim, lost, sentence
from fedtune.report.tables import EXPORTS
from fedtune.runs.folder import RunFolder
from fedtune.tasks import task_named
from fedtune.workflows.privacy import privacy_of
from fedtune.workflows.setup import Setup

Exports = dict[str, dict[str, Any]]
"""What each export is, by kind: file, bytes and figures, or a `note` alone that says why it was left out."""

# those whose lower case is the name model hubs use
_LICENCES = ("Apache-2.0", "MIT", "BSD-3-Clause", "CC-BY-4.0")
_KINDS = EXPORTS | {"peft": "LoRA for PEFT"}


def model_card(run: RunFolder, setup: Setup, bundle: Bundle, round: int, exports: Exports) -> str:
    """The card after `round` rounds; baselines are in it where summary.json has them."""
    summary = json.loads(run.summary.read_bytes()) if run.summary.exists() else {}
    name, manifest, lines = run.path.resolve().name, bundle.manifest, run.metrics()
    parts = [
        _front_matter(
            manifest,
            name,
            public_name(setup.job.data.source),
            lines[-1]["accuracy"] if lines and setup.job.personal.method != "head" else None,
            exports,
        ),
        f"# {' '.join(str(summary.get('title') or name).split())}",
        _table(
            _facts(
                setup,
                manifest,
                round,
                lines[-1] if lines else {},
                summary.get("baselines", {}),
                _privacy(privacy_of(run)),
            )
        ),
        "## Files",
        _files(exports),
        "## Use",
        _usage(setup.job.model, manifest, exports),
    ]
    return "\n\n".join(parts) + "\n"


def public_name(source: str) -> str:
    """The name of a base or data set without the folders of this machine: of a path, its last part."""
    kind, colon, name = source.partition(":")
    if colon and kind == "package":
        return name
    name = name if colon and kind == "hf" else source
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _front_matter(manifest: Manifest, name: str, data: str, accuracy: float | None, exports: Exports) -> str:
    """Values are JSON, which is YAML too."""
    pipeline = task_named(manifest.task).pipeline
    lines: dict[str, Any] = {"base_model": public_name(manifest.source)}
    if manifest.licence in _LICENCES:
        lines["license"] = manifest.licence.lower()
    elif manifest.licence:
        lines |= {"license": "other", "license_name": manifest.licence}
    lines |= {"pipeline_tag": pipeline, "tags": ["federated-learning", "fedtune", manifest.spec.method]}
    if "file" in exports.get("peft", {}):
        lines["library_name"] = "peft"
    if accuracy is not None:
        metrics = [{"type": "accuracy", "value": round(accuracy, 4)}]
        result = {
            "task": {"type": pipeline},
            "dataset": {"name": data, "type": "held-out"},
            "metrics": metrics,
        }
        lines |= {"metrics": ["accuracy"], "model-index": [{"name": name, "results": [result]}]}
    return (
        "---\n"
        + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in lines.items())
        + "---"
    )


def _facts(
    setup: Setup,
    manifest: Manifest,
    round: int,
    last: dict[str, Any],
    baselines: dict[str, Any],
    privacy: str,
) -> list[tuple[str, str]]:
    """Rows of name and value; an empty value is left out. `last` is the last line of metrics.jsonl."""
    spec, split, fed = manifest.spec, setup.split, setup.job.federation
    train, held_out = (count(len(part.rows)) for part in (split.train, split.held_out))
    where = task_named(manifest.task).scored
    measured = last.get("accuracy") is not None
    return [
        (
            "base",
            (
                f"{public_name(manifest.source)}, {count(manifest.parameters)} "
                f"parameters, sha256 {manifest.sha256}"
            ),
        ),
        ("licence of the base", manifest.licence or "not known to fedtune; see where the base comes from"),
        ("task", manifest.task + (f": {', '.join(manifest.labels)}" if manifest.labels else "")),
        (
            "method",
            f"{spec.method}, rank {spec.rank} on {len(spec.linears)} linear layers"
            if spec.linears
            else spec.method,
        ),
        ("trained numbers", f"{count(spec.size)}, of which {count(spec.head_size)} in the task head"),
        (
            "data",
            (
                f"{public_name(setup.job.data.source)}: {len(split.clients)} clients, "
                f"{train} training and {held_out} held-out examples"
            ),
        ),
        ("rounds", f"{round} of {fed.rounds}, {fed.cohort} clients in a round"),
        ("bytes exchanged", size(last["total_bytes"]) if "total_bytes" in last else ""),
        (
            "accuracy",
            f"{number(last['accuracy'])} on {count(last['evaluated'])} {where}"
            if measured
            else "not measured",
        ),
        ("head", _head(setup, manifest)),
        (
            "accuracy of what clients keep",
            (
                f"{number(last['personal_accuracy'])} on {count(last['personal_evaluated'])} "
                f"{where.replace('all clients', 'their own')}, {count(last['personal_clients'])} clients"
            )
            if last.get("personal_clients")
            else "",
        ),
        (
            "accuracy of the most common label",
            number(baselines["majority"]["accuracy"]) if "majority" in baselines else "",
        ),
        (
            "accuracy of the frozen base, head fitted on pooled data",
            number(baselines["head"]["accuracy"]) if "head" in baselines else "",
        ),
        ("privacy", privacy),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]


def _head(setup: Setup, manifest: Manifest) -> str:
    """Said where the head in the exported files is as it was drawn."""
    if setup.job.personal.method == "head":
        return "the initial one, which nobody trained: the trained heads stay with the clients"
    drawn = task_named(manifest.task).has_head and not manifest.spec.head_size
    return (
        (
            f"the initial one, drawn at random (federation.seed = {setup.job.federation.seed}) and frozen: "
            "only the adapter was trained"
        )
        if drawn
        else ""
    )


def _privacy(p: Privacy) -> str:
    """The figure, and for whom and against whom it holds. Names no client: a card is for everybody."""
    return sentence(p) if lost(p) else " ".join([claim(p), *p.get("assumptions", [])[:2]])


def _table(rows: list[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows if value)


def _files(exports: Exports) -> str:
    head = (
        "| what | file | size | largest difference of logits | same label | accuracy | checked on |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(_file_row(kind, e) for kind, e in exports.items())


def _file_row(kind: str, e: dict[str, Any]) -> str:
    if "file" not in e:
        return f"| {_KINDS[kind]} | left out: {_cell(e['note'])} | | | | | |"
    checked = f"{count(e['examples'])} of {count(e['of'])}" if "examples" in e else ""
    figures = (
        (small(e["max_difference"]), number(e["label_agreement"]), number(e["accuracy"]))
        if checked
        else ("", "", "")
    )
    return f"| {_KINDS[kind]} | {' | '.join((e['file'], size(e['bytes']), *figures, checked))} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _usage(model: ModelSection, manifest: Manifest, exports: Exports) -> str:
    parts = []
    if "file" in exports.get("float32", {}):
        given = task_named(manifest.task).inputs.given
        parts.append(
            "With fedtune, or on a device that has a copy of onnx/ and no torch:\n\n```\n"
            f"fedtune predict . {given}\n```"
        )
    if "file" in exports.get("peft", {}):
        code = _PEFT_TEXT if task_named(manifest.task).has_head else _PEFT_LM
        code = code.format(
            base=json.dumps(public_name(manifest.source)), length=model.max_length, pool=_POOLS[model.pooling]
        )
        parts.append(f"With PEFT:\n\n```python\n{code}```")
    return "\n\n".join(parts) or "adapter/adapter.json says what the tensors in adapter/ are."


_PEFT_TEXT = """\
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

BASE = {base}  # the name or folder of the base
texts = ["a text", "and another"]
body = PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), "peft").eval()
head = load_file("peft/head.safetensors")
batch = AutoTokenizer.from_pretrained(BASE)(texts, padding=True, truncation=True, max_length={length}, \
return_tensors="pt")
with torch.no_grad():
    hidden = body(**batch).last_hidden_state
{pool}
logits = pooled @ head["head.weight"].T + head["head.bias"]
"""
_POOLS = {
    "mean": 'mask = batch["attention_mask"].unsqueeze(-1)\npooled = (hidden * mask).sum(1) / mask.sum(1)',
    "first": "pooled = hidden[:, 0]",
}
_PEFT_LM = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

BASE = {base}  # the name or folder of the base
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "peft").eval()
"""
