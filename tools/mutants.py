"""How many small faults the tests see: plants them one at a time, in a copy, and runs the tests of the module.

A fault is one of: a comparison or a sum turned round, an ``and`` for an ``or``, a condition that always or never
holds, a number off by one, a constant True or False turned round, a statement left out. From each module the same
sample is drawn for the same seed. What survives is either a hole in the tests or a fault that makes no difference:
the stored list is for a person to look at.

    python tools/mutants.py [--each 20] [--seed 0] [--out bench/results/mutants.json] [module ...]

A module is a path under icon2_rt. Results of other modules in the output file are kept.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The tests that should see a fault, beside those whose name holds the module's.
TESTS: dict[str, list[str]] = {
    "steering.py": ["test_steering.py", "test_steering_engine.py"],
    "prompts.py": ["test_reading.py", "test_chats.py", "test_template_faults.py", "test_bad_input.py"],
    "runtime.py": ["test_bad_input.py", "test_reading.py", "test_sampling.py", "test_sharing.py", "test_stream.py"],
    "engine/engine.py": ["test_engine_memory.py", "test_sharing.py", "test_parity.py", "test_bad_input.py"],
    "engine/sampling.py": ["test_sampling.py", "test_bad_input.py"],
    "ops/sample.py": ["test_sampling.py", "test_ops.py"],
    "pipeline/calibrate.py": ["test_pipeline_calibration.py"],
    "pipeline/checks.py": ["test_pipeline_health.py"],
    "pipeline/consistency.py": ["test_pipeline_consistency.py"],
    "pipeline/folder.py": ["test_pipeline_folder.py"],
    "pipeline/health.py": ["test_pipeline_health.py", "test_pipeline_consistency.py"],
    "pipeline/pairs.py": ["test_pipeline_shapes.py", "test_pipeline_consistency.py"],
}
SECONDS = 600  # a fault that makes a loop endless is seen too

COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
}  # fmt: skip


def faults_of(node: ast.AST) -> Iterator[ast.AST]:
    """What a node could be by mistake; annotations and texts are left alone by the caller."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        yield ast.Compare(node.left, [COMPARE[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.If | ast.IfExp):
        for value in (True, False):
            changed = copy.copy(node)
            changed.test = ast.Constant(value)
            yield changed
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()


def code_of(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every node behind a field that holds code of functions: (parent, field, place in a list)."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_params") or isinstance(tree, ast.Raise):
            continue  # what messages say is not of interest here
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield tree, name, place
                yield from code_of(child)


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what is changed, whole source) of every fault in the functions of a module."""
    tree = ast.parse(source)
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        for parent, name, place in list(code_of(function)):
            field = getattr(parent, name)
            node = field if place is None else field[place]
            for fault in faults_of(node):
                line = getattr(node, "lineno", function.lineno)
                what = f"{ast.unparse(node)[:60]!r} -> {ast.unparse(ast.fix_missing_locations(fault))[:60]!r}"
                if place is None:
                    setattr(parent, name, fault)
                else:
                    field[place] = fault
                yield line, what, ast.unparse(ast.fix_missing_locations(tree))
                if place is None:
                    setattr(parent, name, node)
                else:
                    field[place] = node


def survives(tests: list[str]) -> bool:
    """Do the tests pass? In a fork, which has torch and transformers imported, and nothing of ours."""
    child = os.fork()
    if child == 0:
        import pytest

        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        signal.alarm(SECONDS)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("modules", nargs="*", default=[*TESTS], metavar="module")
    arguments.add_argument("--each", type=int, default=20, help="faults drawn from a module (20)")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, default=ROOT / "bench/results/mutants.json")
    given = arguments.parse_args()
    given.out = given.out.absolute()
    unknown = [module for module in given.modules if module not in TESTS]
    if unknown:
        arguments.error(f"no tests are named for {', '.join(unknown)}; there are {', '.join(TESTS)}")
    found = json.loads(given.out.read_text())["modules"] if given.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("icon2_rt", "kernels", "tests", "bench", "pyproject.toml"):
            source, copied = ROOT / name, Path(folder) / name
            shutil.copytree(source, copied) if source.is_dir() else shutil.copy(source, copied)
        os.chdir(folder)
        sys.path[0] = folder
        sys.dont_write_bytecode = True
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        import torch
        import transformers

        torch.set_num_threads(1)
        assert transformers.PreTrainedModel and "icon2_rt" not in sys.modules
        for module in given.modules:
            path = Path("icon2_rt") / module
            whole, tests = path.read_text(), [f"tests/{test}" for test in TESTS[module]]
            if not survives(tests):
                raise SystemExit(f"{module}: its tests fail as it is")
            everything = list(mutants(whole))
            drawn = random.Random(f"{given.seed} {module}").sample(everything, min(given.each, len(everything)))
            left = []
            for line, what, changed in sorted(drawn):
                path.write_text(changed)
                if survives(tests):
                    left.append(f"{line}: {what}")
                    print(f"{module}:{left[-1]}", flush=True)
            path.write_text(whole)
            found[module] = {"seed": given.seed, "faults": len(drawn), "of": len(everything), "survived": left}
            stored = {"benchmark": "mutants", "modules": dict(sorted(found.items()))}
            given.out.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
            print(f"{module}: {len(drawn) - len(left)} of {len(drawn)} faults were seen", flush=True)


if __name__ == "__main__":
    main()
