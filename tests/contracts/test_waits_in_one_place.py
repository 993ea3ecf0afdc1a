"""No wait hides a number of its own: what sleeps, joins or times out takes it from
fedtune.process.waits or from the job.
"""

import ast
from pathlib import Path

import pytest

import fedtune

ROOT = Path(fedtune.__file__).parent
WAITING = {"sleep", "wait"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_wait_has_a_number_of_its_own(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        waits = [k.value for k in node.keywords if k.arg in ("timeout", "seconds")] + (
            node.args[:1] if name in WAITING else []
        )
        numbers = [
            n.value
            for w in waits
            for n in ast.walk(w)
            if isinstance(n, ast.Constant)
            and isinstance(n.value, (int, float))
            and n.value > 0
            and type(n.value) is not bool
        ]
        assert not numbers, f"line {node.lineno}: {name} waits {numbers}; name it in fedtune/process/waits.py"
