"""From the name of a base to a folder of files, and from the folder to its hash. No torch here."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fedtune import packages
from fedtune.common.storage import sha256_of
from fedtune.errors import EnvironmentProblem, ModelError

WEIGHTS = "*.safetensors"
_PICKLED = "*.pth"
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model"]


@dataclass(frozen=True)
class Source:
    """Where a base lies: its folder, the files that hold its weights (empty when there are none),
    and what they hash to.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]

    def sha256(self) -> str:
        """sha256 of the weights: of the file where there is one, of the sorted "name hash" lines
        where there are several.
        """
        if len(self.weights) == 1:
            return sha256_of(self.weights[0])
        lines = "".join(f"{p.name} {sha256_of(p)}\n" for p in sorted(self.weights))
        return hashlib.sha256(lines.encode()).hexdigest()


def locate(source: str) -> Source:
    """Finds the base a job names: `package:NAME`, `hf:NAME`, `hf:FOLDER` or a folder.

    Raises:
        ModelError: no such folder or package, or pickled weights in a folder of the user's own.
        EnvironmentProblem: a hub name that is not cached here and cannot be downloaded.
    """
    kind, colon, name = source.partition(":")
    if colon and kind == "own":
        raise ModelError(
            f"model.source = {source!r}: a module that was passed from Python; "
            "pass it again: fedtune.simulate(job, out=…, model=…, data=…)"
        )
    if colon and kind == "package":
        folder = packages.find(name)
    elif colon and kind == "hf":
        folder = Path(name).expanduser() if Path(name).expanduser().is_dir() else _from_hub(name)
    elif Path(source).expanduser().is_dir():
        folder = Path(source).expanduser()
    else:
        raise ModelError(f"model.source = {source!r}: no such folder; give a folder, hf:NAME or package:NAME")
    weights, pickled = sorted(folder.glob(WEIGHTS)), sorted(folder.glob(_PICKLED))
    if pickled and not weights and not (folder / "config.json").is_file():
        if not colon or kind != "package":  # pinned by hash; a user's own pickle is never opened
            raise ModelError(
                f"model.source = {source!r}: holds {pickled[0].name}, fedtune opens safetensors only; "
                "convert it with save_pretrained"
            )
        weights = pickled
    return Source(source, folder, tuple(weights))


def check_hash(source: Source, wanted: str) -> str:
    """The hash of the weights; raises ModelError when the job wants another."""
    found = source.sha256()
    if wanted and found != wanted:
        raise ModelError(
            f"model.sha256 = {wanted[:12]}…: the weights in {source.folder} have {found[:12]}…; "
            "use the right base or remove the key"
        )
    return found


def read_config(source: Source) -> dict:
    """config.json as a dict. Raises ModelError where it is missing, broken, or asks for code of its own."""
    path = source.folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.source = {source.name!r}: {source.folder} has no config.json; "
            "give a folder saved by save_pretrained"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ModelError(f"{path}: not valid JSON ({e}); the download may be broken") from None
    if not isinstance(config, dict):
        raise ModelError(
            f"{path}: holds a {type(config).__name__}, not an object of settings; "
            "give a folder saved by save_pretrained"
        )
    if "auto_map" in config:
        raise ModelError(
            f"model.source = {source.name!r}: needs code of its own (auto_map in config.json), "
            "which fedtune never runs; use a base that transformers knows"
        )
    return config


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except HFValidationError as e:
        raise ModelError(
            f"model.source = 'hf:{name}': neither a folder here nor a hub name ({str(e).splitlines()[0]})"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise EnvironmentProblem(
            f"model.source = 'hf:{name}': not a folder here, not in the local cache, "
            f"and the hub did not answer ({type(e).__name__}); give a folder instead"
        ) from None
