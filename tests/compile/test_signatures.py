"""An op reads the same in all its forms."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil

import pytest

from icon2_rt import kernels
from icon2_rt.ops import Ops

OPS = {field.name for field in dataclasses.fields(Ops)} & {
    module.name for module in pkgutil.iter_modules(kernels.__path__)
}


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_launcher_has_the_name_and_arguments_of_its_reference(name: str) -> None:
    launcher = getattr(importlib.import_module(f"icon2_rt.kernels.{name}"), name)
    ours, theirs = (inspect.signature(f).parameters for f in (launcher, getattr(Ops("reference"), name)))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    assert f"icon2_rt.ops.{name}" in launcher.__doc__


def test_the_kernels_are_there() -> None:
    assert {"add_steer_rmsnorm", "begin_step", "rope_append", "silu_mul"} <= OPS
