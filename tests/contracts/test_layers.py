"""Who may import whom: read from the source with ast, so that an import inside a function counts as well."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import fedtune

ROOT = Path(fedtune.__file__).parent
LAYERS = (  # from the bottom up; a module stands where its longest prefix here says
    ("errors", "types"),
    ("process.waits", "process.child"),
    ("common", "process"),
    ("tasks",),
    ("wire", "provision", "packages", "models.layout"),
    ("adapters.spec", "adapters.frames", "adapters.kinds", "aggregation", "units"),
    ("job",),
    ("algorithms.probes",),
    ("secagg",),
    ("runs.ledger", "privacy", "adapters.describe", "data", "report"),
    ("algorithms", "adapters.ranks"),
    ("stateful",),
    ("bundles.subspace",),
    ("bundles.bundle",),
    ("runs.checkpoint", "bundles.offer"),
    ("runs",),
    ("round",),
    ("models",),
    ("adapters",),
    ("training", "onnx"),
    ("server", "client", "edge", "simulation"),
    ("workflows",),
    ("cli",),
)
ROLES = LAYERS[-3]
HEAVY = ("torch", "transformers", "efficientnet_lite_pytorch")
ONLY_IN = {  # a library, and the only parts of fedtune that may import it
    "torch": ("models", "adapters", "training", "onnx", "simulation", "client", "workflows"),
    "transformers": ("models",),
    "flwr": ("server", "client", "simulation"),
    "typer": ("cli",),
    "onnxruntime": ("onnx", "edge"),
    "matplotlib": ("report",),
    "sklearn": ("workflows",),
    "grpc": ("client", "process"),
    "cryptography": ("provision", "secagg"),
    "prometheus_client": ("server",),
}


def name_of(path: Path) -> str:
    """ "adapters.spec" for fedtune/adapters/spec.py, "adapters" for its __init__, "" for fedtune's own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def imports(name: str) -> frozenset[str]:
    """Full names of all modules that a module of fedtune imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"fedtune.{name} has a relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@cache
def inside(name: str) -> frozenset[str]:
    """The modules of fedtune among them, without the "fedtune."."""
    found = {full.removeprefix("fedtune.") for full in imports(name) if full.startswith("fedtune.")}
    return frozenset(found & MODULES.keys()) - {name}


@cache
def libraries(name: str) -> frozenset[str]:
    return frozenset(full.partition(".")[0] for full in imports(name))


def layer(name: str) -> int:
    prefixes = {prefix: place for place, names in enumerate(LAYERS) for prefix in names}
    fitting = [p for p in prefixes if name == p or name.startswith(f"{p}.")]
    assert fitting, f"fedtune.{name} stands in no layer; give it one in LAYERS"
    return prefixes[max(fitting, key=len)]


def closure(start: str, packages: bool = True) -> set[str]:
    """Everything in fedtune that importing `start` can bring in, with the packages on the way."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        todo += [*inside(name), *([name.rpartition(".")[0]] if packages and "." in name else [])]
    return seen


def test_the_document_has_the_same_layers():
    text = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("\n## Layers\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert tuple(tuple(re.findall("`([^`]+)`", row)) for row in reversed(rows)) == LAYERS


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_arrows_go_down_only(name):
    package = name.partition(".")[0]
    for other in inside(name):
        same = other.partition(".")[0] == package and layer(other) == layer(name)
        empty_package = MODULES[other].name == "__init__.py" and not inside(other)
        assert layer(other) < layer(name) or same or empty_package, (
            f"fedtune.{name} imports fedtune.{other}, which is not below it"
        )


@pytest.mark.parametrize("name", MODULES)
def test_no_module_comes_back_to_itself(name):
    assert all(name not in closure(other, packages=False) for other in inside(name))


@pytest.mark.parametrize("role", ROLES)
def test_roles_do_not_import_each_other(role):
    reached = {
        name.partition(".")[0]
        for member in MODULES
        if member.partition(".")[0] == role
        for name in closure(member)
    }
    assert reached.isdisjoint(set(ROLES) - {role})


@pytest.mark.parametrize(
    "role", ["server", "edge", "client", "workflows.serve", "workflows.status", "workflows.privacy"]
)
def test_service_device_and_edge_reach_no_torch(role):
    for member in [name for name in MODULES if name == role or name.startswith(f"{role}.")]:
        for name in closure(member):
            assert libraries(name).isdisjoint(HEAVY), (
                f"fedtune.{member} reaches fedtune.{name}, which imports torch"
            )


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_only_where_it_belongs(library):
    users = {name.partition(".")[0] for name in MODULES if library in libraries(name)}
    assert users <= set(ONLY_IN[library])


@pytest.mark.parametrize(
    "module, absent",
    [
        ("fedtune", ("torch", "transformers", "flwr", "onnxruntime", "pydantic")),
        ("fedtune.server.app", ("torch", "transformers", "onnxruntime")),
        ("fedtune.workflows.serve", ("torch", "transformers", "onnxruntime", "ray")),
        ("fedtune.client.device", ("torch", "transformers", "onnxruntime", "ray")),
        ("fedtune.process.flower", ("torch", "transformers", "flwr")),
        ("fedtune.client.supernode_process", ("torch", "transformers", "flwr")),
        ("fedtune.workflows.status", ("torch", "transformers", "flwr")),
        ("fedtune.workflows.privacy", ("torch", "transformers", "flwr", "matplotlib", "opacus")),
        ("fedtune.edge.service", ("torch", "transformers", "flwr", "onnx")),
        ("fedtune.secagg.server", ("torch", "transformers", "flwr")),
        ("fedtune.secagg.client", ("torch", "transformers", "flwr")),
        ("fedtune.cli.main", ("torch", "transformers", "flwr", "onnxruntime")),
    ],
)
def test_a_fresh_interpreter_stays_light(module, absent):
    code = f"import sys, {module}; print(*(m for m in {absent!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
