"""Every test asserts something: by itself, by an exception or warning that it demands, or by a helper that asserts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Of pytest, torch and numpy: each of these raises where something is not as it should be.
ASSERTING = {"raises", "warns", "fail", "opcheck", "assert_close", "assert_allclose", "assert_array_equal"}


def functions(module: ast.Module) -> Iterator[ast.FunctionDef]:
    """Every function of a file, those in classes and in other functions too."""
    return (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))


def asserts(function: ast.FunctionDef) -> bool:
    """Is there an assert of something that is not settled by how it is written? A text and a tuple are true."""
    return any(
        isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant | ast.Tuple | ast.JoinedStr)
        for node in ast.walk(function)
    )


def called(function: ast.FunctionDef, files: set[str]) -> set[str]:
    """What is called: ``f`` of ``f()`` and of ``file.f()``, for a file of the tests; and what asserts by its name.

    The methods of objects are left out: many have the name of some helper.
    """
    found = set()
    for node in ast.walk(function):
        place = node.func if isinstance(node, ast.Call) else None
        if isinstance(place, ast.Name):
            found.add(place.id)
        elif isinstance(place, ast.Attribute):
            of_a_file = isinstance(place.value, ast.Name) and place.value.id in files
            if of_a_file or place.attr in ASSERTING:
                found.add(place.attr)
    return found


def that_assert_nothing(modules: dict[str, ast.Module]) -> list[str]:
    """``file::test`` of every test that asserts nothing, whatever it calls; a helper is known by its name."""
    files = {Path(file).stem for file in modules}
    everything = [(file, f, called(f, files)) for file, module in modules.items() for f in functions(module)]
    known = ASSERTING | {f.name for _, f, _ in everything if asserts(f)}
    while more := {f.name for _, f, calls in everything if calls & known} - known:
        known |= more
    return [f"{file}::{f.name}" for file, f, _ in everything if f.name.startswith("test_") and f.name not in known]


def test_every_test_asserts_something() -> None:
    modules = {str(p.relative_to(HERE)): ast.parse(p.read_text(encoding="utf-8")) for p in HERE.rglob("*.py")}
    tests = [f for module in modules.values() for f in functions(module) if f.name.startswith("test_")]
    assert len(tests) > 500
    assert that_assert_nothing(modules) == []


@pytest.mark.parametrize(
    ("body", "is_empty"),
    [
        ("run()", True),
        ("x = run()\n    x == 3", True),
        ("assert 'it runs'", True),
        ("assert (run(), 'it runs')", True),
        ("helper(run())", True),
        ("assert run() == 3", False),
        ("with pytest.raises(ValueError): run()", False),
        ("compare(run(), 3)", False),
        ("twice(run(), 3)", False),
        ("torch.testing.assert_close(run(), 3)", False),
    ],
)
def test_a_test_that_asserts_nothing_is_found(body: str, is_empty: bool) -> None:
    helpers = (
        "def helper(a):\n    return a\n"
        "def compare(a, b):\n    assert a == b\n"
        "def twice(a, b):\n    return [compare(a, b), compare(b, a)]\n"
    )
    found = that_assert_nothing(
        {"helpers.py": ast.parse(helpers), "test_x.py": ast.parse(f"def test_x():\n    {body}\n")}
    )
    assert found == (["test_x.py::test_x"] if is_empty else [])
