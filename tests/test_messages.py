"""What a new user mistypes is answered in our own words, with what was meant."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from icon2_rt import Runtime, tiny
from icon2_rt.pipeline.loading import model_path
from tests.models import random_prompts, tiny_llama, tiny_tokenizer

PROMPTS = random_prompts([4, 5])


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return Runtime(tiny_llama(), tiny_tokenizer(), page_size=8, device="cpu")


@pytest.mark.parametrize("given", ["/not/there", "./not-there", "~/not-there", "a/b/c", Path("not-there")], ids=str)
def test_a_path_that_is_not_there(given, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"there is no folder /.*config.json.*or a hub id") as caught:
        Runtime.from_pretrained(given)
    assert os.path.abspath(os.path.expanduser(given)) in str(caught.value)


@pytest.mark.parametrize("given", ["not a model", "a:b", ""])
def test_a_name_that_can_be_neither_a_folder_nor_a_hub_id(given):
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a hub id"):
        Runtime.from_pretrained(given)


def test_a_hub_id_that_cannot_be_loaded():
    with pytest.raises(
        OSError, match="there is no folder 'nobody/nothing' here, and as a hub id it could not be loaded"
    ):
        Runtime.from_pretrained("nobody/nothing", local_files_only=True)


def test_home_is_expanded(monkeypatch):
    folder = Path(tiny.path())
    monkeypatch.setenv("HOME", str(folder.parent))
    given = f"~/{folder.name}"
    rt = Runtime.from_pretrained(given, device="cpu", kv_memory="16MiB")
    assert rt.spec.n_layers == 6
    assert model_path(given) == str(folder)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"load_in_8bit": True}, ValueError, "load_in_8bit=True: quantised weights are not supported"),
        ({"load_in_4bit": True}, ValueError, "load_in_4bit=True: quantised weights are not supported"),
        ({"max_row": 4}, TypeError, "unknown option 'max_row': did you mean 'max_rows'"),
        ({"backends": "native"}, TypeError, "unknown option 'backends': did you mean 'backend'"),
        ({"colour": "red"}, TypeError, "unknown option 'colour': neither the runtime has it nor transformers"),
    ],
    ids=str,
)
def test_options_of_from_pretrained(options, error, says):
    with pytest.raises(error, match=says):
        Runtime.from_pretrained(tiny.path(), device="cpu", kv_memory="16MiB", **options)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("stop", "stop_strings"),
        ("max_tokens", "max_new_tokens"),
        ("temperatur", "temperature"),
        ("num_samples", "n"),
        ("noize", "noise"),
        ("seeds", "seed"),
        ("prompt", "prompts"),
    ],
)
def test_unknown_options_of_everything_that_generates(rt, name, meant):
    for call in (
        lambda **o: rt.generate(PROMPTS, **o),
        lambda **o: rt.generate_branches(PROMPTS, [None], **o),
        lambda **o: rt.stream_branches(PROMPTS, [None], **o),
        lambda **o: rt.generate_pairs(PROMPTS, positive=None, negative=None, **o),
        lambda **o: rt.stream_pairs(PROMPTS, positive=None, negative=None, **o),
    ):
        with pytest.raises(TypeError, match=f"unknown option '{name}': did you mean '{meant}'"):
            call(**{name: 1})


def test_what_a_call_does_not_have_is_not_suggested(rt):
    with pytest.raises(TypeError, match="unknown option 'steer': did you mean 'steering'"):
        rt.generate(PROMPTS, steer=None)
    with pytest.raises(
        TypeError, match=r"unknown option 'steer'.*Arguments are prompts, positive, negative, n"
    ) as caught:
        rt.generate_pairs(PROMPTS, positive=None, negative=None, steer=None)
    assert "'steering'" not in str(caught.value)
    with pytest.raises(TypeError, match=r"unknown option 'xyzzy'[.] Arguments are prompts, branches, n"):
        rt.generate_branches(PROMPTS, [None], xyzzy=1)


@pytest.mark.parametrize(("role", "meant"), [("usr", "user"), ("User", "user"), ("asistant", "assistant")])
def test_a_misspelt_role(rt, role, meant):
    with pytest.raises(ValueError, match=rf"prompts\[0\]: role '{role}' of a chat message: did you mean '{meant}'"):
        rt.generate([[{"role": role, "content": "the"}]], max_new_tokens=2)


def test_roles_of_ones_own_pass(rt):
    own = [{"role": "context", "content": "the"}, {"role": "user", "content": "the"}]
    assert rt.decode(rt.encode(own)[:1]) == ""
    assert len(rt.encode(own)) > 5
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'users' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    named = Runtime(tiny_llama(), tokenizer, page_size=8, device="cpu")
    assert named.decode(named.encode([{"role": "users", "content": "the"}])) == "the"
