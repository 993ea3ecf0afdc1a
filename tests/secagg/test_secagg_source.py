"""Secrets come from the operating system: no generator that can be seeded is within reach of the package."""

import ast
from pathlib import Path

import pytest

import fedtune.secagg

FILES = sorted(Path(fedtune.secagg.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_seedable_generator_and_no_pickle(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {
        f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names
    }
    assert not {
        name for name in imported if {"random", "seeds", "pickle", "Crypto", "flwr"} & set(name.split("."))
    }
    # Generators may be handed in for rounding; none is made here, by numpy or otherwise.
    # secrets.SystemRandom cannot be seeded.
    attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert attributes.isdisjoint(
        {"random", "default_rng", "Generator", "RandomState", "seed", "Random"}
        - ({"seed"} if path.stem == "client" else set())
    )
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Assert)]


def test_every_module_was_read():
    assert {p.stem for p in FILES} >= {
        "client",
        "graph",
        "keys",
        "masks",
        "messages",
        "quantise",
        "reveal",
        "server",
        "shamir",
        "terms",
        "vectors",
    }
