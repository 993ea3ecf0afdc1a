"""What `pip install fedtune[edge]` brings is all that a device without torch imports: everything else of
this environment is hidden from it.
"""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

HIDING = """
import sys
class Hidden:
    names = set(sys.argv[1].split(","))
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
sys.argv = ["fedtune", *sys.argv[2:]]
from fedtune.cli.main import main
main()
"""


def brought(lines, extra, found):
    """Adds (name, extra) of all distributions that these requirements bring."""
    for line in lines:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
            continue
        for more in ("", *needed.extras):
            if (key := (same(needed.name), more)) not in found:
                found.add(key)
                brought(metadata.requires(needed.name) or [], more, found)
    return found


def same(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def hidden():
    """Top-level modules of this environment that the edge installation does not have."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    installed = {
        name
        for name, _ in brought(
            [*project["dependencies"], *project["optional-dependencies"]["edge"]], "", set()
        )
    } | {"fedtune"}
    hidden = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not set(map(same, owners)) & installed and module.isidentifier()
    }
    assert {
        "torch",
        "transformers",
        "onnx",
        "opacus",
        "peft",
        "ray",
        "sklearn",
        "pyarrow",
        "matplotlib",
    } <= hidden
    assert not {"onnxruntime", "flwr", "numpy", "tokenizers", "PIL", "grpc"} & hidden
    return ",".join(sorted(hidden))


def run(hidden, *arguments):
    return subprocess.run(
        [sys.executable, "-c", HIDING, hidden, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_device_of_the_edge_installation_labels_and_measures(hidden, prepared, tmp_path):
    from safetensors.numpy import save_file

    made = prepared()
    save_file(dict(made.bundle.initial), tmp_path / "adapter.safetensors")
    done = run(
        hidden, "edge", "predict", made.graphs, "a lovely film", "--adapter", tmp_path / "adapter.safetensors"
    )
    assert (done.returncode, done.stdout.split()[0] in ("good", "bad")) == (0, True), done.stderr
    done = run(hidden, "edge", "bench", "--graphs", made.graphs, "--steps", "1")
    assert done.returncode == 0 and "step" in done.stdout, done.stderr


def test_its_trainer_and_its_flower_side_import_nothing_else(hidden, prepared, tiny_csv):
    made = prepared("federation.local-steps=1")
    code = (
        HIDING.partition("sys.argv = ")[0]
        + """
from pathlib import Path
import fedtune.client.device, fedtune.client.supernode_process, fedtune.process.trainer
from fedtune.bundles.bundle import open_bundle
from fedtune.edge.device import open_device
from fedtune.wire import encode
bundle = open_bundle(Path(sys.argv[2]))
device = open_device(bundle, Path(sys.argv[3]), Path(sys.argv[4]), threads=1)
packet = encode("model", bundle.schema, bundle.start, round=1, frame=bundle.frame_digest)
print(len(device.handle(packet, "a")))
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", code, hidden, made.bundle.folder, tiny_csv, made.graphs],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and int(done.stdout) > 4 * made.bundle.schema.size, done.stderr


def test_what_needs_torch_says_so(hidden, tmp_path):
    (tmp_path / "data.csv").write_text("text,label\na,b\n")
    done = run(hidden, "prepare", "-o", tmp_path / "bundle")
    assert done.returncode == 3 and re.fullmatch(r"fedtune: .*fedtune\[[a-z]+\].*\n", done.stderr), (
        done.stderr
    )
    assert not (tmp_path / "bundle").exists()
