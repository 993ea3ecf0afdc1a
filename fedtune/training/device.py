"""A device with torch: its own data, the base that its bundle names, and a worker.

What the trainer process holds in memory.
"""

from pathlib import Path

from fedtune.algorithms.units import spec_of
from fedtune.bundles.bundle import Bundle, Manifest
from fedtune.data.clients import ClientStore
from fedtune.errors import EnvironmentProblem, ModelError
from fedtune.models.base import TunableModel, layout
from fedtune.models.load import load_encoder, load_model
from fedtune.models.sources import Source, locate
from fedtune.round.keeping import own_state
from fedtune.training.holder import Device, read_data
from fedtune.training.worker import Worker


def open_device(bundle: Bundle, data: Path, base: Path | None = None, kept: Path | None = None) -> Device:
    """Reads and checks the data, finds the base and checks its hash, and only then loads it,
    which takes the longest.

    Args:
        data: what `--data` named: a file of texts or a folder of images, as the bundle's job has it.
        base: folder of the base; without one, the source that the bundle names is looked for on this machine.
        kept: where this device keeps what a job lets it keep from round to round.

    Raises:
        DataError, ModelError, RunError: one line about the data, the base, or a bundle that is not whole.
        EnvironmentProblem: a base that would have to be downloaded and cannot be.
    """
    job, manifest = bundle.job, bundle.manifest
    dataset, parts = read_data(bundle, data)
    source = find_base(manifest, base)
    encoder = load_encoder(job.model, source)
    model = load_model(job.model, source, max(1, len(manifest.labels)), job.federation.seed)
    _require_spec(bundle, model, source)
    worker = Worker(job, manifest.spec, model, encoder, lambda: bundle, kept=own_state(bundle, kept))
    return Device(bundle, ClientStore(dataset, parts, encoder), worker)


def find_base(manifest: Manifest, base: Path | None) -> Source:
    """The base with the weights that the bundle was made with.

    Raises:
        ModelError: not on this machine, without weights, or with weights of another sha256.
        EnvironmentProblem: a hub name that cannot be downloaded.
    """
    source = _named(manifest) if base is None else _given(base.expanduser().absolute(), manifest)
    found = source.sha256()
    if found != manifest.sha256:
        place = f"{manifest.source} in {source.folder}" if base is None else f"--base {source.folder}"
        raise ModelError(
            f"{place}: the weights have sha256 {found[:12]}…, the coordinator's base has "
            f"{manifest.sha256[:12] or 'none'}…; give that base with --base FOLDER"
        )
    return source


def _named(manifest: Manifest) -> Source:
    """The source that the bundle names.

    A folder of the coordinator's need not be here, nor a hub within reach.
    """
    hint = f"; this is the coordinator's base {manifest.source!r}, give a copy of it with --base FOLDER"
    if manifest.source.startswith("package:"):  # says already how it is fetched
        hint = ""
    try:
        source = locate(manifest.source)
    except ModelError as e:
        raise ModelError(f"{e}{hint}") from None
    except EnvironmentProblem as e:
        raise EnvironmentProblem(f"{e}{hint}") from None
    if not source.weights:
        raise ModelError(f"{source.folder}: holds no .safetensors weights{hint}")
    return source


def _given(folder: Path, manifest: Manifest) -> Source:
    """The folder of `--base`."""
    wanted = f"give the folder of {manifest.source!r} with its .safetensors weights"
    kind, _, name = manifest.source.partition(":")
    if kind == "package":
        wanted += f", or leave --base out and run `fedtune fetch {name}`"
    try:
        if not folder.is_dir():
            raise ModelError(
                f"--base {folder}: {'is a file' if folder.exists() else 'does not exist'}; {wanted}"
            )
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"--base {folder}: holds no .safetensors weights; {wanted}")
    except OSError as e:
        raise ModelError(f"--base {folder}: cannot be read ({e.strerror}); check its permissions") from None
    return locate(str(folder))


def _require_spec(bundle: Bundle, model: TunableModel, source: Source) -> None:
    """Raises ModelError when what the bundle trains is not what its job makes of this base, so that no
    message can name other tensors.
    """
    if spec_of(layout(model), bundle.job) != bundle.manifest.spec:
        raise ModelError(
            f"{source.folder}: its layers as opened here are not those that the bundle names; "
            f"use the coordinator's versions (fedtune {bundle.manifest.versions.get('fedtune', 'unknown')}, "
            f"transformers {bundle.manifest.versions.get('transformers', 'unknown')})"
        )
