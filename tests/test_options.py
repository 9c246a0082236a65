"""The options of what generates have names: in signatures, in help and for type checkers, the same everywhere."""

from __future__ import annotations

import inspect
import pydoc
import typing

import pytest

from icon2_rt import GenerateOptions, Runtime
from icon2_rt.engine.sampling import DEFAULT_MAX_NEW_TOKENS, SUPPORTED
from tests.models import tiny_llama, tiny_tokenizer

METHODS = ["generate", "generate_branches", "stream_branches", "generate_pairs", "stream_pairs"]
NAMES = list(GenerateOptions.__annotations__)


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return Runtime(tiny_llama(), tiny_tokenizer(), page_size=8, device="cpu")


def test_the_typed_dict_has_every_option():
    call = inspect.signature(Runtime._stream).parameters.values()
    own = [p.name for p in call if p.kind is p.KEYWORD_ONLY]
    assert [*own, *SUPPORTED] == NAMES
    assert not GenerateOptions.__required_keys__
    for name in NAMES:
        assert name in GenerateOptions.__doc__


@pytest.mark.parametrize("name", METHODS)
def test_every_method_lists_its_options(rt, name):
    method = getattr(rt, name)
    signature = inspect.signature(method)
    assert list(signature.parameters)[-len(NAMES) :] == NAMES
    assert not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    assert "max_new_tokens: 'int | None' = None" in pydoc.render_doc(method, renderer=pydoc.plaintext)
    unpacked = typing.get_type_hints(getattr(Runtime, name))["options"]
    assert unpacked == typing.Unpack[GenerateOptions]


def test_defaults_shown_are_those_that_hold(rt):
    shown = inspect.signature(rt.generate).parameters
    for p in inspect.signature(Runtime._stream).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            assert shown[p.name].default == p.default, p.name
    every = {name: shown[name].default for name in NAMES}
    prompts = [[5, 6, 7]]
    assert rt.generate(prompts, **every) == rt.generate(prompts)


def test_the_defaults_that_are_written_down(rt):
    assert f"max_new_tokens: the most tokens of a response ({DEFAULT_MAX_NEW_TOKENS}," in GenerateOptions.__doc__
    [greedy] = rt.generate([[5, 6, 7]], eos_token_id=[])
    assert len(greedy.token_ids) == DEFAULT_MAX_NEW_TOKENS
    assert greedy.seed is None
    [drawn] = rt.generate([[5, 6, 7]], temperature=0.9, max_new_tokens=2)
    assert drawn.seed is not None
