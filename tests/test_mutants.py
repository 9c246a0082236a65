"""tools/mutants.py: the faults that it plants are whole modules that differ in one place, and tests that see them."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from bench import results

ROOT = Path(__file__).parent.parent
SOURCE = """
LIMIT = 3

def clipped(x: int, low: int = 0) -> int:
    if x < low or x > LIMIT:
        raise ValueError(f"{x + 1} is out")
    print(x)
    return x - low
"""


def test_every_fault_is_one_change_inside_a_function() -> None:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools/mutants.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    plain = ast.unparse(ast.parse(SOURCE)).splitlines()
    found = []
    for _, _, changed in tool.mutants(SOURCE):
        pairs = [(a, b) for a, b in zip(plain, changed.splitlines(), strict=True) if a != b]
        assert len(pairs) == 1
        found.append(pairs[0][1].strip())
    assert sorted(found) == sorted(
        [
            "if True:",
            "if False:",
            "if x < low and x > LIMIT:",
            "if x <= low or x > LIMIT:",
            "if x < low or x >= LIMIT:",
            "pass",
            "return x + low",
            "def clipped(x: int, low: int=1) -> int:",
        ]
    )
    assert all((ROOT / "icon2_rt" / module).exists() for module in tool.TESTS)
    assert all((ROOT / "tests" / test).exists() for tests in tool.TESTS.values() for test in tests)


def test_results_of_benchmarks_are_told_beside_those_of_mutants(tmp_path: Path) -> None:
    assert (results.RESULTS / "mutants.json").exists()
    results.main(["--out", str(tmp_path / "told.md")])
    assert (tmp_path / "told.md").read_text() == (ROOT / "bench/RESULTS.md").read_text()
