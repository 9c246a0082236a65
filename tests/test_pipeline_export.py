"""Other trainers' formats: what is in them, and that TRL trains on each with the tokens the model was prompted with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from icon2_rt import Direction, DirectionSet
from icon2_rt.chat_template import ChatTemplate
from icon2_rt.pipeline import export
from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.runner import RunResult, finished_run, run
from tests.models import random_vectors, tiny_llama, tiny_tokenizer
from tests.test_cli import Icon2, icon2  # noqa: F401  # the fixture

WORDS = ("Why?", "How is it?", "Sing.", "Name the thing.", "Go on.", "Is it so?")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokenizer puts its first token in front of every text, as Llama 3's does."""
    path = tmp_path_factory.mktemp("model")
    llama = tiny_llama(eos_token_id=1, bos_token_id=0, pad_token_id=0)
    with torch.no_grad():
        llama.lm_head.weight[[0, 2, 3, 4]] = 0
    llama.save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ladder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("given")
    DirectionSet([Direction(name, random_vectors(4, 48, seed=k)) for k, name in enumerate(("kind", "brief"))]).save(
        folder / "d.safetensors"
    )
    (folder / "i.txt").write_text("\n".join(WORDS))
    config = {
        "model": str(model),
        "runtime": {"threads": 1, "kv_memory": "32MiB"},
        "directions": {"file": str(folder / "d.safetensors")},
        "instructions": {"file": str(folder / "i.txt")},
        "filter": {"keep": 1.0},
        "pairs": {"positive": 0.5, "negative": -0.5, "shape": "ladder", "rungs": 3, "max_new_tokens": 16},
    }
    return run(RunConfig.from_dict(config), folder / "run")


def test_rows(ladder: RunResult) -> None:
    records = list(ladder.records())
    dpo = export.of_run(ladder, "dpo")
    assert [{key: r[key] for key in ("prompt", "chosen", "rejected", "id", "criterion")} for r in records] == dpo
    kto = export.of_run(ladder, "kto")
    assert [row["label"] for row in kto] == [True, False] * len(records)
    assert [row["completion"] for row in kto] == [r[side] for r in records for side in ("chosen", "rejected")]
    for row, record in zip(export.of_run(ladder, "listwise", "plain"), records, strict=True):
        assert row["responses"] == [response[0]["content"] for response in record["responses"]]
        assert row["weights"] == pytest.approx([2 / 3, 1 / 3, 0])
        assert row["prompt"] == f"<|user|>{record['prompt'][0]['content']}<|end|><|assistant|>"


def test_identical_responses_are_left_out(ladder: RunResult) -> None:
    records = list(ladder.records())
    records[2] = {**records[2], "rejected": records[2]["chosen"]}
    assert len(list(export.convert(records, "dpo"))) == len(records) - 1
    assert len(list(export.convert(records, "kto"))) == 2 * (len(records) - 1)


def test_what_cannot_be_exported(ladder: RunResult, tmp_path: Path) -> None:
    records = [{k: v for k, v in record.items() if k != "responses"} for record in ladder.records()]
    with pytest.raises(ValueError, match=r'pairs\.shape = "ladder"'):
        list(export.convert(records, "listwise"))
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        list(export.convert(records, "dpo", "plain"))
    with pytest.raises(ValueError, match=r"there is no manifest\.json"):
        finished_run(tmp_path)


def _adds_in_front(tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokens} $A", special_tokens=[("<|bos|>", 0), ("<|end|>", 1)]
    )
    return tokenizer


def test_a_plain_prompt_has_the_chat_s_tokens_or_none() -> None:
    chat = [{"role": "user", "content": "Why?"}]
    assert export.plain_prompt(ChatTemplate(tiny_tokenizer()), chat) == "<|bos|><|user|>Why?<|end|><|assistant|>"
    assert export.plain_prompt(ChatTemplate(_adds_in_front("<|bos|>")), chat) == "<|user|>Why?<|end|><|assistant|>"
    with pytest.raises(ValueError, match="export the conversational style"):
        export.plain_prompt(ChatTemplate(_adds_in_front("<|end|>")), chat)


@pytest.mark.parametrize("style", ["conversational", "plain"])
@pytest.mark.parametrize(("form", "ending"), [("dpo", ".jsonl"), ("kto", ".parquet")])
def test_trl_trains_on_it(ladder: RunResult, model: Path, tmp_path: Path, form: Any, style: Any, ending: str) -> None:
    """One step of the trainer from the file; its tokens are those that the model was prompted with and wrote."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    path = tmp_path / f"rows{ending}"
    path.write_bytes(export.to_bytes(export.of_run(ladder, form, style), ending))
    kind = "json" if ending == ".jsonl" else "parquet"
    data = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer_class, config_class = (trl.DPOTrainer, trl.DPOConfig) if form == "dpo" else (trl.KTOTrainer, trl.KTOConfig)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(model),
        args=config_class(
            str(tmp_path / "out"),
            max_steps=1,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    assert trainer.train().global_step == 1
    side = "chosen" if form == "dpo" else "completion"
    [record] = [r for r in ladder.records() if r["id"] == data[0]["id"]]
    wanted = tokenizer.apply_chat_template(record["prompt"], tokenize=False, add_generation_prompt=True)
    for row in trainer.train_dataset:
        whole = tokenizer.decode(row["prompt_ids"])
        if whole == wanted:
            assert tokenizer.decode(row[f"{side}_ids"]) in {
                record[s][0]["content"] + "<|end|>" for s in ("chosen", "rejected")
            }
            break
    else:
        pytest.fail("no row has the prompt's tokens")


def test_the_command(icon2: Icon2, ladder: RunResult, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "kto.jsonl"
    code, text, err = icon2("export", ladder.path, "--format", "kto", "--out", out)
    assert code == 0, err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert f"{len(rows)} rows" in text
    assert {row["label"] for row in rows} == {True, False}
    for arguments, words in (
        (("--format", "sft", "--out", out), "--format: must be one of dpo, kto, listwise"),
        (("--style", "fancy", "--out", out), "--style: must be one of"),
        (("--out", tmp_path / "a.csv"), "must end in .jsonl or .parquet"),
    ):
        code, _, err = icon2("export", ladder.path, *arguments)
        assert code == 2
        assert words in err
    assert icon2("export", tmp_path, "--out", out)[0] == 2
