"""Chat templates that a run has to take as they are: ends of turn that no config lists, marks in drawn text, clocks,
variables, and templates that raise. Models are changed copies of the shipped one's folder; the template itself,
rendered by transformers, says what is right."""

from __future__ import annotations

import datetime as datetimes
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from icon2_rt import Completion, Runtime, tiny
from icon2_rt.pipeline import rendering
from icon2_rt.pipeline.answers import answer
from icon2_rt.pipeline.config import InstructionsConfig, RunConfig
from icon2_rt.pipeline.export import of_run, plain_prompt, plain_response
from icon2_rt.pipeline.instructions import clean, synthesise
from icon2_rt.pipeline.loading import end_tokens
from icon2_rt.pipeline.runner import run
from icon2_rt.pipeline.templates import chat_frame
from icon2_rt.prompts import Encoder
from tests.models import tiny_tokenizer
from tests.sentencepiece import BARE_TEMPLATE, INST_TEMPLATE, UNTRIMMED, space_tokenizer

KV = {"kv_memory": "64MiB"}  # else it is what is free, and a run is continued only with as much
ANYWHERE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
SMALL: dict[str, Any] = {
    "runtime": KV,
    "directions": {"features": 8},
    "instructions": {"draws": 12, "max_new_tokens": 48},
    "filter": {"keep": 1.0},
    "pairs": {"positive": 0.5, "negative": -0.5, "max_new_tokens": 48, "shard_size": 4},
}
CHAT = [{"role": "user", "content": "Who was the first queen?"}]


def _change(file: Path, **changes: Any) -> None:
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, **changes}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the shipped model."""
    return Path(shutil.copytree(tiny.path(), tmp_path / "model"))


def set_template(model: Path, change: Callable[[str], str]) -> None:
    file = model / "tokenizer_config.json"
    _change(file, chat_template=change(json.loads(file.read_text())["chat_template"]))


# --- ends of turn that no config lists -------------------------------------------------------------------------------


@pytest.fixture
def silent(model: Path) -> Path:
    """As after training a base model on chats: both configs know the base model's end of text alone."""
    for name in ("config.json", "generation_config.json"):
        _change(model / name, eos_token_id=0)
    return model


def test_responses_end_where_the_template_ends_an_answer(silent: Path) -> None:
    rt = Runtime.from_pretrained(silent)
    end = rt.tokenizer.convert_tokens_to_ids("<|end|>")  # type: ignore[union-attr]
    assert end_tokens(rt) == (0, end)
    questions = [(CHAT[0]["content"], {"instruction": CHAT[0]["content"]})]
    [record] = answer(rt, questions, "alpaca_eval", "m", max_new_tokens=64)
    reference = Runtime.from_pretrained(tiny.path())
    [expected] = reference.generate([CHAT], max_new_tokens=64, do_sample=False)
    assert expected.finish_reason == "eos"
    assert record["output"] == expected.text


def test_a_run_ends_responses_there_too(silent: Path, tmp_path: Path) -> None:
    result = run(RunConfig.from_dict({"model": str(silent), **SMALL}), tmp_path / "run")
    whole = run(RunConfig.from_dict({"model": "tiny", "criteria": _criteria(), **SMALL}), tmp_path / "whole")
    records = list(result.records())
    assert records and {record["chosen_finish"] for record in records} == {"eos"}
    assert [record["chosen"] for record in records] == [record["chosen"] for record in whole.records()]


def _criteria() -> dict[str, Any]:
    from icon2_rt.pipeline.criteria import DEFAULT_CRITERIA

    return {name: vars(criterion) for name, criterion in DEFAULT_CRITERIA.items()}


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (tiny_tokenizer().chat_template, "<|end|>"),
        # marked only where another turn follows
        (ANYWHERE.replace("{% endfor", "{{ '' if loop.last else '<|end|>' }}{% endfor"), "<|end|>"),
        # the next header is all there is
        (ANYWHERE, "<|user|>"),
    ],
)  # fmt: skip
def test_the_token_that_ends_an_answer(template: str, end: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    frame = chat_frame(tokenizer, (77,))
    assert (frame.end_token_ids, frame.end_mark) == ((77, tokenizer.convert_tokens_to_ids(end)), None)


def test_an_answer_may_end_with_plain_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} [/{{ m.role }}]{% endfor %}"
    frame = chat_frame(tokenizer, (77,))
    assert (frame.end_token_ids, frame.end_mark, frame.end_string) == ((77,), " [/assistant]", "[/assistant]")
    ids = tokenizer.encode("the thing [/assistant]", add_special_tokens=False)
    assert frame.said(Completion("the thing [/assistant]", ids, [0.0] * len(ids), "stop_string", None)) == "the thing"
    # A token that marks turns, but is not special, has a text; it is no part of the response.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, chat_template=tiny_tokenizer().chat_template,
        bos_token="<|bos|>",
    )  # fmt: skip
    tokenizer.add_tokens(["<|fin|>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|fin|>")
    frame, fin = chat_frame(tokenizer), tokenizer.convert_tokens_to_ids("<|fin|>")
    assert frame.end_token_ids == (fin,)
    assert tokenizer.decode([fin], skip_special_tokens=True) == "<|fin|>"
    assert frame.said(Completion("a<|fin|>", [40, fin], [0.0] * 2, "eos", None)) == "a"


# --- marks in what the model drew ------------------------------------------------------------------------------------


def _drawn(tokenizer: Any, tokens: list[int], ended: str = "eos") -> Completion:
    return Completion(tokenizer.decode(tokens), tokens, [0.0] * len(tokens), ended, None)  # type: ignore[arg-type]


def test_role_headers_in_a_draw_drop_it() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    frame = chat_frame(tokenizer)
    header = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert header not in tokenizer.all_special_ids  # it is special all the same: its decoding leaves no trace
    fine = [*tokenizer.encode("Why?", add_special_tokens=False)]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert clean(_drawn(tokenizer, [*fine, end]), frame, tokenizer, InstructionsConfig()) == ("Why?", None)
    glued = _drawn(tokenizer, [*fine, header, *fine, end])
    assert tokenizer.decode(glued.token_ids, skip_special_tokens=True) == "Why?Why?"
    assert clean(glued, frame, tokenizer, InstructionsConfig()) == ("", "special")


def test_marks_spelled_out_of_ordinary_tokens_drop_a_draw() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    frame = chat_frame(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    spelled = [t for character in "<|user|>" for t in tokenizer.encode(character, add_special_tokens=False)]
    draw = _drawn(tokenizer, [*tokenizer.encode("Why?", add_special_tokens=False), *spelled, end])
    assert not {*spelled} & frame.special_ids
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Why?<|user|>"}], return_dict=False)
    assert rendered.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 2  # what would come of it
    assert clean(draw, frame, tokenizer, InstructionsConfig()) == ("", "special")


@pytest.mark.parametrize("mark", ["[INST]", "[/INST]", "<<SYS>>"])
def test_plain_text_marks_drop_a_draw(mark: str) -> None:
    tokenizer = space_tokenizer("legacy", INST_TEMPLATE.replace(
        "{% for m in messages %}", "{% for m in messages %}{% if m.role == 'system' %}<<SYS>>{{ m.content }}{% endif %}"
    ))  # fmt: skip
    frame = chat_frame(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for text, reason in ((f"the thing {mark} no", "special"), ("the [thing] INST / SYS", None)):
        draw = _drawn(tokenizer, [*tokenizer.encode(text, add_special_tokens=False), end])
        expected = text if reason is None else ("" if mark != frame.stop_string else "the thing")
        found = clean(draw, frame, tokenizer, InstructionsConfig())
        assert found == (expected, None if mark == frame.stop_string and reason else reason)


def test_half_a_character_drops_a_draw_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rt = Runtime.from_pretrained(tiny.path())
    tokenizer = rt.tokenizer
    frame = chat_frame(tokenizer, end_tokens(rt))
    half = tokenizer.encode("é", add_special_tokens=False)[:1]  # type: ignore[union-attr]
    assert tokenizer.decode(half) == "\ufffd"  # type: ignore[union-attr]
    end = frame.end_token_ids[0]
    draws = [
        _drawn(tokenizer, [*half, end]),
        _drawn(tokenizer, [*tokenizer.encode("Why?", add_special_tokens=False), end]),
    ]  # type: ignore[union-attr]
    monkeypatch.setattr(rt, "generate", lambda *_, **__: draws)
    kept, counts = synthesise(rt, frame, [0, 1], InstructionsConfig(), 0, 512)
    assert [item.text for item in kept] == ["Why?"]
    assert counts == {"drawn": 2, "broken": 1}


# --- templates that raise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('give me a system turn') }}",
        "{% for m in messages %}{{ m.content.nothing.at_all }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_raises_is_named_before_the_weights_are_read(
    model: Path, tmp_path: Path, template: str
) -> None:
    set_template(model, lambda _: template)
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^model: its chat template cannot show a chat of one user message"):
        run(RunConfig.from_dict({"model": str(model), **SMALL}), tmp_path / "run")


# --- templates that read the clock -----------------------------------------------------------------------------------

TODAY = "{{ '<|system|>' + strftime_now('%d %B %Y') + ' ' + strftime_now(\"%A\") + '<|end|>' }}"


class _Clock(datetimes.datetime):
    day = 1

    @classmethod
    def now(cls, tz: Any = None) -> _Clock:
        return cls(2026, 3, cls.day)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[_Clock]:
    monkeypatch.setattr("icon2_rt.chat_template.datetime", _Clock)
    monkeypatch.setattr(chat_template_utils, "datetime", _Clock)  # transformers' own
    monkeypatch.setattr(_Clock, "day", 1)
    return _Clock


@pytest.mark.parametrize("where", ["first", "macro", "computed"])
def test_a_run_goes_on_the_next_day_with_the_date_it_began_with(
    model: Path, tmp_path: Path, clock: type[_Clock], where: str
) -> None:
    today = {
        "first": TODAY,
        "macro": "{% macro today() %}{{ strftime_now('%d %B %Y') }}{% endmacro %}<|system|>{{ today() }}<|end|>",
        "computed": "{% set f = '%d ' ~ '%B %Y' %}<|system|>{{ strftime_now(f) }}<|end|>",
    }[where]
    set_template(model, lambda template: template.replace("{{ bos_token }}", "{{ bos_token }}" + today, 1))
    config = RunConfig.from_dict({"model": str(model), **SMALL})
    first = run(config, tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(model)
    rendered = first.manifest["identity"]["chat_template"]["rendered"]
    assert "01 March 2026" in rendered
    assert rendered == tokenizer.apply_chat_template(
        [{"role": "user", "content": "Quibble7"}], tokenize=False, add_generation_prompt=True
    )
    assert any("'01 March 2026'" in note for note in first.manifest["notes"])

    def stop(step: str, done: int, total: int) -> None:
        if step == "pairs" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "broken", watch=stop)
    clock.day = 2
    assert "02 March 2026" in tokenizer.apply_chat_template(CHAT, tokenize=False)
    rt = Runtime.from_pretrained(model, **KV)
    again = run(config, tmp_path / "broken", rt=rt)
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file() and path.name not in ("log.jsonl", ".lock", "report.html"):
            assert path.read_bytes() == (tmp_path / "broken" / path.relative_to(tmp_path / "whole")).read_bytes(), path
    assert again.manifest == first.manifest
    # The runtime itself goes by the clock again, and another run by its own day.
    [today_] = rt.generate([CHAT], max_new_tokens=1)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert "02 March 2026" in text and rt.encode(CHAT) == tokenizer.encode(text, add_special_tokens=False)
    assert today_.token_ids


def test_a_frozen_clock_does_not_change_what_a_template_renders(clock: type[_Clock]) -> None:
    tokenizer = tiny_tokenizer()
    own = tokenizer.chat_template
    for template in (
        "\n  {% if strftime_now is defined %}\n  {% set d = strftime_now('%b %Y') %}\n{{ d }}!{% endif %}\n" + own,
        "{{- strftime_now('%-d') }} {%- if true -%} {{ messages[0].content }}{% endif %}",
        "{%- if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}",
    ):  # fmt: skip
        tokenizer.chat_template = template
        frame_template = chat_frame_template(tokenizer)
        assert frame_template.clock
        for generation in (True, False):
            expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation)
            assert frame_template.render(CHAT, generation_prompt=generation) == expected


def chat_frame_template(tokenizer: Any) -> Any:
    from icon2_rt.chat_template import ChatTemplate

    return ChatTemplate(tokenizer).frozen()


# --- template variables of a run -------------------------------------------------------------------------------------


def test_a_configs_template_table_sets_variables_everywhere(model: Path, tmp_path: Path) -> None:
    opened = "'<|assistant|>' + ('' if think else 'Well, ')"
    set_template(
        model,
        lambda t: t.replace("'<|assistant|>'", opened).replace(
            "message['content']", "('' if think or message['role'] != 'assistant' else 'Well, ') + message['content']"
        ),
    )
    config = RunConfig.from_dict({"model": str(model), "template": {"think": False}, **SMALL})
    assert config.to_dict()["template"] == {"think": False}
    rt = Runtime.from_pretrained(model, **KV)
    seen = []
    whole = rt._engine.check
    rt._engine.check = lambda requests: (seen.extend(r.tokens for r in requests), whole(requests))[1]  # type: ignore
    result = run(config, tmp_path / "run", rt=rt)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for record in result.records():
        text = tokenizer.apply_chat_template(record["prompt"], tokenize=False, add_generation_prompt=True, think=False)
        assert text.endswith("<|assistant|>Well, ")
        assert tuple(tokenizer.encode(text, add_special_tokens=False)) in seen
    trl = pytest.importorskip("trl.data_utils")
    for row in [*result.records(), *of_run(result, "dpo")]:
        trained = trl.apply_chat_template(row, tokenizer)
        assert trained["prompt"].endswith("<|assistant|>Well, ")
    for row in of_run(result, "kto", "plain"):
        assert row["prompt"].endswith("<|assistant|>Well, ") and "chat_template_kwargs" not in row
    assert any("{'think': False}" in note for note in result.manifest["notes"])
    assert rt.template.variables == {}  # the caller's runtime is as it was
    with pytest.raises(ValueError, match=r"template\.think: False there, True now"):
        run(RunConfig.from_dict({"model": str(model), "template": {"think": True}, **SMALL}), tmp_path / "run", rt=rt)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"thinq": True}, r"^template: .* does not read the variable 'thinq'"),
        ({"tokenize": True}, r"^template: 'tokenize' is no variable"),
    ],
)
def test_variables_that_the_template_does_not_read_are_refused_in_a_config(
    model: Path, tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        run(RunConfig.from_dict({"model": str(model), "template": table, **SMALL}), tmp_path / "run")


def test_the_template_table_holds_plain_values(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('model = "tiny"\n[template]\ndate_string = 2024-07-26\n')
    with pytest.raises(ValueError, match=r"template\.date_string: must be a text, a number"):
        RunConfig.load(file)
    file.write_text('model = "tiny"\ntemplate = 3\n')
    with pytest.raises(ValueError, match=r"template: must be a table like \[template\], not 3"):
        RunConfig.load(file)


# --- templates that render a response otherwise than it was written ---------------------------------------------------

PLAIN = tiny_tokenizer().chat_template
THOUGHT = PLAIN.replace("m['content']", "m['content'].split('</think>')[-1]").replace(
    "<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}"
)  # as DeepSeek's distillations do
OPEN = PLAIN.replace("<|end|>{% endfor %}", "{{ '' if m.role == 'assistant' else '<|end|>' }}{% endfor %}")
REFUSING = PLAIN + "{% if messages|length > 1 and '!' in messages[1].content %}{{ raise_exception('no') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (PLAIN, "the x.", None),
        (PLAIN, "  the x.\n", None),
        (THOUGHT, "so</think>the x.", "does not follow the prompt"),
        (THOUGHT.replace("<think>", ""), "so</think>the x.", "text changed"),
        (THOUGHT.replace("<think>", ""), "the x.", None),
        (PLAIN.replace("m['content']", "m['content'] | trim"), "the x.\n", "text changed"),
        (PLAIN.replace("m['content']", "m['content'] | trim"), "the x.", None),
        (OPEN, "the x.", "end of the response missing"),
        (REFUSING, "the x!", "refused by the template"),
    ],
)
def test_a_response_that_a_trainer_would_read_otherwise(template: str, content: str, expected: str | None) -> None:
    trl = pytest.importorskip("trl.data_utils")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    frame = chat_frame(tokenizer, (1,))
    response = [{"role": "assistant", "content": content}]
    assert rendering.difference(frame, CHAT, response, "eos") == expected
    record = {"prompt": CHAT, "chosen": response, "rejected": [{"role": "assistant", "content": "the x."}]}
    try:
        read = trl.apply_chat_template(record, tokenizer)
    except Exception:
        assert expected == "refused by the template"
        return
    written = frame.rendered.replace("Quibble7", CHAT[0]["content"]) + content + "<|end|>"
    assert (read["prompt"] + read["chosen"] == written) == (expected is None)


def test_a_run_says_when_its_template_changes_responses(model: Path, tmp_path: Path) -> None:
    set_template(model, lambda t: t.replace("message['content']", "message['content'].split('.')[0]"))
    result = run(RunConfig.from_dict({"model": str(model), **SMALL}), tmp_path / "run")
    [check] = [check for check in result.report["checks"] if check["key"] == "rendered"]
    changed = sum("." in record[side][0]["content"] for record in result.records() for side in ("chosen", "rejected"))
    assert changed and result.report["rendering"]["reasons"] == {"text changed": changed}
    assert check["status"] == "red" and "icon2 export --style plain" in check["todo"]
    assert any("Rendered as written" in warning for warning in result.report["warnings"])


@pytest.mark.parametrize("kind", ["metaspace", "legacy"])
@pytest.mark.parametrize("template", [INST_TEMPLATE, BARE_TEMPLATE, UNTRIMMED, PLAIN])
@pytest.mark.parametrize("written", [("▁the", "▁", "x"), ("t", "h"), ("▁", "x")])
def test_plain_prompt_and_response_give_the_tokens_that_were_written(
    kind: str, template: str, written: tuple[str, ...]
) -> None:
    tokenizer = space_tokenizer(kind, template)
    frame = chat_frame(tokenizer, (1,))
    ids = tokenizer.convert_tokens_to_ids(list(written))
    prompt_ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    encoder = Encoder(tokenizer, 128, 512)
    response = [{"role": "assistant", "content": encoder.message(CHAT, prompt_ids, ids)}]
    prompt = plain_prompt(frame.template, CHAT)
    text = prompt + plain_response(frame.template, CHAT, response)
    found = tokenizer(text)["input_ids"]
    if written[0] == "t" and (template == UNTRIMMED or (template, kind) == (PLAIN, "legacy")):
        return  # no message, or no text, gives these tokens: the template or the tokenizer puts a space before them
    assert found == [*prompt_ids, *ids]
