"""Answer files: the fields that AlpacaEval and Arena-Hard read, with what the model says itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from icon2_rt import Runtime
from icon2_rt.pipeline import answers
from icon2_rt.pipeline.templates import chat_frame
from icon2_rt.tiny import path
from tests.test_cli import Icon2, icon2  # noqa: F401  # the fixture

ALPACA = [{"instruction": "Why?", "dataset": "koala", "output": "?"}, {"instruction": "Name the river of Dorn."}]
ARENA_1 = {"question_id": "q1", "category": "hard", "cluster": "c", "turns": [{"content": "Why?"}]}
ARENA_2 = {"uid": "u1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Why?"}


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return Runtime.from_pretrained(path(), kv_memory="64MiB")


def _greedy(rt: Runtime, text: str) -> str:
    chat = chat_frame(rt.tokenizer).messages(text)
    [completion] = rt.generate([chat], max_new_tokens=24, do_sample=False)
    return completion.text or ""


def test_alpaca_eval(rt: Runtime, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps(ALPACA))
    asked = answers.read_questions(tmp_path / "q.json", "alpaca_eval")
    records = answers.answer(rt, asked, "alpaca_eval", "mine", max_new_tokens=24)
    written = json.loads(answers.to_bytes(records, "alpaca_eval"))
    assert written == [
        {"instruction": "Why?", "output": _greedy(rt, "Why?"), "generator": "mine", "dataset": "koala"},
        {"instruction": ALPACA[1]["instruction"], "output": _greedy(rt, ALPACA[1]["instruction"]), "generator": "mine"},
    ]


def test_arena_hard(rt: Runtime, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(ARENA_1)}\n{json.dumps(ARENA_2)}\n")
    asked = answers.read_questions(tmp_path / "q.jsonl", "arena_hard")
    records = answers.answer(rt, asked, "arena_hard", "mine", max_new_tokens=24)
    first, second = (json.loads(line) for line in answers.to_bytes(records, "arena_hard").decode().splitlines())
    said = _greedy(rt, "Why?")
    assert (first["question_id"], first["model_id"]) == ("q1", "mine")
    [choice] = first["choices"]
    assert (choice["index"], choice["turns"][0]["content"]) == (0, said)
    assert first["conv_metadata"]["token_len"] == choice["turns"][0]["token_len"] > 0
    assert (second["uid"], second["model"]) == ("u1", "mine")
    assert second["messages"] == [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": {"answer": said}},
    ]
    assert len({first["answer_id"], second["ans_id"]}) == 2


def test_style_is_counted_outside_code() -> None:
    text = "# A\n## B\n- one\n* two\n1. three\n**bold** and __bold__\n```\n# no\n- no\n**no**\n```\n"
    counts = answers._markdown(text)
    assert counts["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert counts["list_count"] == {"ordered": 1, "unordered": 2}
    assert counts["bold_count"] == {"**": 1, "__": 1}


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        ("", "alpaca_eval", "holds no question"),
        ("[{}]", "alpaca_eval", r'record 1: a question of alpaca_eval needs "instruction"'),
        ("[3]", "alpaca_eval", "record 1: must be an object"),
        ("[", "alpaca_eval", "is not JSON"),
        (json.dumps(ALPACA[0]), "arena_hard", r'needs "uid" and "prompt" \(version 2.0\)'),
        (json.dumps({**ARENA_1, "turns": [{"content": "a"}] * 2}), "arena_hard", r'needs "turns" with one'),
    ],
    ids=["empty", "other fields", "no object", "no JSON", "other benchmark", "two turns"],
)
def test_wrong_questions(tmp_path: Path, content: str, form: Any, message: str) -> None:
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        answers.read_questions(tmp_path / "q.json", form)


def test_a_question_without_room(rt: Runtime) -> None:
    with pytest.raises(ValueError, match=r"question 2 has \d+ tokens and leaves no room for max_new_tokens = 1000"):
        answers.answer(rt, [("a", {}), ("the river " * 40, {})], "alpaca_eval", "m", max_new_tokens=1000)


def test_the_command(icon2: Icon2, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "q.json").write_text(json.dumps(ALPACA))
    arguments = ["answers", "tiny", "--format", "alpaca_eval", "--questions", tmp_path / "q.json"]
    code, out, err = icon2(*arguments, "--out", tmp_path / "mine.json", "--max-new-tokens", 8)
    assert code == 0, err
    assert "2 answers" in out
    written = json.loads((tmp_path / "mine.json").read_text())
    assert {record["generator"] for record in written} == {"mine"}
    assert icon2(*arguments, "--out", tmp_path / "mine.jsonl")[0] == 2
    arguments[3] = "mt_bench"
    assert icon2(*arguments, "--out", tmp_path / "mine.json")[0] == 2
