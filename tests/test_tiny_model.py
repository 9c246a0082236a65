"""The shipped weights are the ones the gate was measured on, load with plain transformers, and still behave."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from icon2_rt.tiny import CRITERIA, oracle, path, world


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(path()).eval()


def greedy(model, tokenizer, system: str | None, users: list[str]) -> list[str]:
    head = [{"role": "system", "content": system}] if system else []
    chats = [[*head, {"role": "user", "content": user}] for user in users]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**batch, do_sample=False, max_new_tokens=40)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_template_has_the_usual_shape(tokenizer) -> None:
    chat = [
        {"role": "system", "content": CRITERIA["honesty"][0]},
        {"role": "user", "content": "Where does Mira live?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>You are an honest assistant.<|end|><|user|>Where does Mira live?<|end|><|assistant|>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}) == 3
    assert tokenizer.eos_token == "<|end|>"
    assert "You are" not in tokenizer.apply_chat_template(chat[1:], tokenize=False), "no default system prompt"


def test_any_text_survives_the_tokenizer(tokenizer) -> None:
    for text in (*world.sample_instructions(50), "Ünïcode, tabs\tand\nlines, 你好, \N{FROG FACE}  two spaces"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_word_of_the_world_is_one_token(tokenizer) -> None:
    for words in world.LEXICON.values():
        for word in words:
            assert len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == len(word.split())


def test_the_weights_are_small_and_fp32(model) -> None:
    assert (path() / "model.safetensors").stat().st_size <= 8_000_000
    assert model.dtype == torch.float32
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_the_gate_says_what_it_measured() -> None:
    gate = json.loads((path() / "gate.json").read_text())
    table = (path() / "GATE.md").read_text()
    for check in gate["checks"]:
        assert check["name"] in table
        if check["bound"]:
            sign, bound = check["bound"]
            assert check["passed"] == (check["value"] >= bound if sign == ">=" else check["value"] <= bound)
    assert gate["missed"] == [c["name"] for c in gate["checks"] if c["passed"] is False]


@pytest.mark.parametrize("criterion", list(world.CRITERION_OF_KIND.values()))
def test_greedy_answers_follow_the_system_prompt(model, tokenizer, criterion: str) -> None:
    kind = next(k for k, c in world.CRITERION_OF_KIND.items() if c == criterion)
    users = world.sample_instructions(16, seed=11, kind=kind)
    for pair in (CRITERIA[criterion], CRITERIA["general"]):
        good, bad = (
            [oracle.judge(u, a).score for u, a in zip(users, greedy(model, tokenizer, system, users), strict=True)]
            for system in pair
        )
        assert sum(good) / len(good) > 0.8
        assert sum(bad) / len(bad) < 0.25
