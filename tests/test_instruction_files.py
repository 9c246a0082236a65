"""Instruction files of every kind, written by their own libraries: what was written is what is read, or it is refused
with the place where it goes wrong."""

from __future__ import annotations

import codecs
import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icon2_rt import Direction, DirectionSet, Runtime, tiny
from icon2_rt.pipeline.answers import read_questions
from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.instructions import Instruction, read_instructions, without_duplicates
from icon2_rt.pipeline.runner import run
from tests.models import random_vectors

# Characters that str.splitlines breaks a line at, and Python's own text files do not.
ODD = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"
TEXTS = ["Why?", ODD, 'Say "x", y', "Tab\there", "ünd"]


def texts(path: Path) -> list[str]:
    return [item.text for item, _ in read_instructions(path)]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("ending", [".txt", "", ".TXT"])
def test_a_line_is_a_line(tmp_path: Path, mark: bytes, newline: str, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(mark + newline.join(TEXTS).encode())
    assert texts(path) == path.read_text(encoding="utf-8-sig").split("\n") == TEXTS


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize(("ending", "dialect"), [(".csv", "excel"), (".tsv", "excel-tab"), (".csv", "unix")])
def test_tables_of_text(tmp_path: Path, mark: bytes, ending: str, dialect: str) -> None:
    path = tmp_path / f"a{ending}"
    rows = [{"id": 10 + n, "criterion": "x" if n else "", "instruction": text} for n, text in enumerate(TEXTS)]
    rows.append({"id": 99, "criterion": "x", "instruction": "two\nlines"})
    with open(path, "w", newline="", encoding="utf-8-sig" if mark else "utf-8") as file:
        writer = csv.DictWriter(file, ["id", "criterion", "instruction"], dialect=dialect)
        writer.writeheader()
        writer.writerows(rows)
    found = read_instructions(path)
    assert [(item.id, item.text) for item, _ in found] == [(row["id"], row["instruction"]) for row in rows]
    assert [record.get("criterion") for _, record in found] == [row["criterion"] or None for row in rows]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"instruction": TEXTS, "criterion": ["x", None, None, None, "y"]}), path)
    found = read_instructions(path)
    assert [(item.id, item.text) for item, _ in found] == list(enumerate(TEXTS))
    assert [record["criterion"] for _, record in found] == ["x", None, None, None, "y"]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_json(tmp_path: Path, mark: bytes) -> None:
    records = [{"instruction": text, "id": 2**63 - 1 - n} for n, text in enumerate(TEXTS)]
    lines, array, plain = (tmp_path / name for name in ("a.jsonl", "a.json", "b.json"))
    lines.write_bytes(mark + "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode())
    array.write_bytes(mark + json.dumps(records, indent=2).encode())
    plain.write_bytes(mark + json.dumps(TEXTS).encode())
    for path in (lines, array):
        assert [{"instruction": item.text, "id": item.id} for item, _ in read_instructions(path)] == records
    assert texts(plain) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"PK", r"instructions are read from \.txt, .*\.parquet files, not from \.xlsx"),
        ("a.md", b"# Why?", r"not from \.md"),
        ("a.jsonl", b'{"instruction": "a"}\n\n{"instruction": "\\ud800"}', r"a\.jsonl, line 3: the text has '\\ud800'"),
        ("a.jsonl", b'{"instruction": "a", "id": 9223372036854775808}', r"line 1: \"id\" must be .*, not 92233720368"),
        ("a.jsonl", b'{"instruction": "a", "id": -1}', r"line 1: \"id\" must be"),
        ("a.jsonl", b'{"instruction": "a", "id": 1}\n{"instruction": "b", "id": 1}', r"line 2: the id 1 .* in line 1"),
        ("a.jsonl", b'{"instruction": "a", "criterion": 3}', r"line 1: \"criterion\" must be a text, not 3"),
        ("a.jsonl", b'{"instruction": "a"}\nWhy?', r"line 2: not JSON"),
        ("a.json", b'[{"instruction": "a"}, 3]', r"entry 2: must be an object or a text, not 3"),
        ("a.json", b'[{"instruction": "a"}', r"a\.json is not JSON"),
        ("a.csv", b"prompt,id\nWhy?,1\n", r"one column must be named \"instruction\"; there are 'prompt', 'id'"),
        ("a.csv", b"Why?\nHow?\n", r"one column must be named \"instruction\"; there are 'Why\?'"),
        ("a.csv", b'instruction,id\n"two\nlines",1\na,b,c\n', r"a\.csv, line 4: 3 cells in a table of 2 columns"),
        ("a.csv", b'instruction\n"open\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.csv", b"instruction,id\na,x\n", r"line 2: \"id\" must be a whole number .* not 'x'"),
        ("a.tsv", b"instruction\tinstruction\na\tb\n", "two columns have the same name"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a Parquet file, or damaged"),
        ("a.txt", codecs.BOM_UTF16_LE + "Why?".encode("utf-16-le"), r"a\.txt is not UTF-8 text but UTF-16"),
        ("a.txt", b"\xff", r"a\.txt is not UTF-8 text"),
        ("a.txt", codecs.BOM_UTF8 + b"\n \n", "holds no instruction"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_instructions(path)


def test_a_text_under_two_criteria_is_two_instructions() -> None:
    items = [Instruction(n, text) for n, text in enumerate(["Why?", "why?", "How?", "WHY?"])]
    kept, dropped = without_duplicates(items, criteria=["a", "b", None, "a"])
    assert ([item.id for item in kept], dropped) == ([0, 1, 2], 1)


def test_a_run_answers_a_text_under_each_criterion_that_it_came_with(tmp_path: Path) -> None:
    size = (6, 128)
    DirectionSet([Direction(name, random_vectors(*size, seed=n)) for n, name in enumerate("ab")]).save(
        tmp_path / "d.safetensors"
    )
    (tmp_path / "i.csv").write_text("instruction,criterion\nWho was the first queen?,a\nWho was the first queen?,b\n")
    config: dict[str, Any] = {
        "model": "tiny",
        "directions": {"file": str(tmp_path / "d.safetensors")},
        "instructions": {"file": str(tmp_path / "i.csv")},
        "filter": {"keep": 1.0},
        "pairs": {"max_new_tokens": 8},
    }
    rt = Runtime.from_pretrained(tiny.path(), kv_memory="64MiB")
    result = run(RunConfig.from_dict(config), tmp_path / "run", rt=rt)
    found = {(record["prompt"][0]["content"], record["criterion"]) for record in result.records()}
    assert found == {("Who was the first queen?", "a"), ("Who was the first queen?", "b")}


def test_questions_and_configs_may_begin_with_a_mark(tmp_path: Path) -> None:
    for name, content in (("q.json", '[{"instruction": "Why?"}]'), ("q.jsonl", '{"instruction": "Why?"}')):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content.encode())
        assert [text for text, _ in read_questions(tmp_path / name, "alpaca_eval")] == ["Why?"]
    (tmp_path / "c.toml").write_bytes(codecs.BOM_UTF8 + b'model = "tiny"\nseed = 3\n')
    assert RunConfig.load(tmp_path / "c.toml").seed == 3
    (tmp_path / "bad.jsonl").write_text('{"instruction": "\\udc00"}')
    with pytest.raises(ValueError, match=r"record 1: the text has '\\udc00'"):
        read_questions(tmp_path / "bad.jsonl", "alpaca_eval")


def test_a_configs_folders_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "mine").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "here" / "c.toml"
    mine = str((tmp_path / "here" / "mine").resolve())
    for given, expected in (
        ("./mine", mine),
        ("mine", mine),
        ("../here/mine", mine),
        ("~/here/mine", mine),
        (mine, mine),
        ("org/name", "org/name"),
        ("tiny", "tiny"),
    ):
        file.write_text(f'model = "{given}"\n[baseline]\nrecipe = "best_of_n"\njudge = "{given}"\n')
        config = RunConfig.load(file)
        assert config.model == expected
        assert config.baseline is not None and config.baseline.judge == expected
    assert RunConfig.from_dict({"model": "./mine"}).model == "./mine"  # of a command line: as a shell has it
