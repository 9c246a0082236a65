"""The examples: the paper's models as their own configurations say, with random weights; training from a run."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from icon2_rt import Runtime, tiny
from icon2_rt.engine.kv import page_bytes
from icon2_rt.models import read_spec
from icon2_rt.models.llama import LLAMA
from icon2_rt.models.qwen2 import QWEN2
from icon2_rt.pipeline.config import RunConfig, controlled_layers
from icon2_rt.pipeline.loading import end_tokens, instruction_room
from icon2_rt.pipeline.runner import run
from icon2_rt.pipeline.templates import chat_frame
from tests.models import randomize

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

LLAMA3_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2_7B: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "tie_word_embeddings": False,
}  # fmt: skip

# What the two models' chat templates render, written anew.
LLAMA3_CHAT = (
    "{% for m in messages %}{{ bos_token if loop.first }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN2_CHAT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAPER_MODELS = {
    "llama3-8b": (LlamaConfig, LLAMA, LLAMA3_8B, LLAMA3_CHAT, ["<|begin_of_text|>", "<|eot_id|>"]),
    "qwen2-7b": (Qwen2Config, QWEN2, QWEN2_7B, QWEN2_CHAT, ["<|endoftext|>", "<|im_end|>"]),
}
MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|im_start|>"]


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One token a character, with the model's own special tokens: the second of the two ends a turn."""
    template, special = PAPER_MODELS[name][3], [*PAPER_MODELS[name][4], *MARKS]
    vocab = {token: i for i, token in enumerate([*special, "\n", *(chr(c) for c in range(32, 127))])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens(special)
    bos = special[0] if name == "llama3-8b" else None
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=special[1], additional_special_tokens=[special[0], *MARKS],
        chat_template=template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _model(name: str, **changes: Any) -> Any:
    config_class, _, sizes, _, _ = PAPER_MODELS[name]
    ends = {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(config_class(**{**sizes, **ends, **changes}))


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_the_paper_s_settings_fit_the_paper_s_models(name: str) -> None:
    """Sizes as published, without weights: what is refused before work is refused here."""
    config = RunConfig.load(EXAMPLES / f"{name}.toml")
    with torch.device("meta"):
        model = _model(name)
    sizes = PAPER_MODELS[name][2]
    spec = dataclasses.replace(  # a spec is read from weights, and here are none: a small model's, with the true sizes
        read_spec(_model(name, num_hidden_layers=1, intermediate_size=8, vocab_size=8), PAPER_MODELS[name][1]),
        n_layers=sizes["num_hidden_layers"],
    )
    assert (spec.n_heads * spec.head_dim, spec.head_dim, spec.n_kv_heads * spec.head_dim) in (
        (4096, 128, 1024),
        (3584, 128, 512),
    )
    assert [i + 1 for i in controlled_layers(config.pairs.layers, spec.n_layers)] == list(range(10, 21))
    assert config.pairs.max_new_tokens + config.instructions.max_new_tokens < spec.max_length
    assert (config.pairs.positive, config.pairs.negative, config.filter.keep) == (0.1, -0.05, 0.1)
    assert (config.directions.features, config.filter.scale, config.directions.method) == (1024, "raw", "pca")
    assert list(config.resolved_criteria()) == ["honesty", "harmlessness", "helpfulness", "general"]
    weights = sum(p.numel() for p in model.parameters()) * 2
    rows = config.runtime.max_rows * (config.pairs.max_new_tokens + config.instructions.max_new_tokens)
    kv = rows / config.runtime.page_size * page_bytes(spec, config.runtime.page_size, torch.bfloat16)
    assert weights + kv < 80e9  # on one GPU of 80 GB with every row full


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_a_block_of_the_paper_s_width(name: str) -> None:
    """One block with every width as published, and a small vocabulary: pairs, and what transformers makes of them."""
    changes = {"num_hidden_layers": 1, "vocab_size": 128, "dtype": torch.float32}
    torch.manual_seed(0)
    rt = Runtime(_model(name, **changes), _tokenizer(name), kv_memory="64MiB")
    torch.manual_seed(0)
    oracle = _model(name, **changes)
    direction = rt.extract_direction([[7, 8], [9, 7]], [[8, 8], [10, 7]], name="any")
    chat = [{"role": "user", "content": "Hi"}]
    [pair] = rt.generate_pairs(
        [chat], positive=0.1 * direction, negative=-0.05 * direction, max_new_tokens=4, do_sample=False
    )
    [scored] = rt.score([chat], [pair.positive])
    prompt = rt.encode(chat)
    with torch.inference_mode():
        logits = oracle(torch.tensor([[*prompt, *pair.positive.token_ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(dim=-1)[range(len(scored.logprobs)), pair.positive.token_ids]
    assert scored.logprobs == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_the_paper_s_models_from_instructions_to_pairs(name: str, tmp_path: Path) -> None:
    """The example as it is, with fewer draws: every block, narrow, with the model's own chat template."""
    sizes = PAPER_MODELS[name][2]
    heads = sizes["num_attention_heads"] // 4
    model = _model(
        name, hidden_size=8 * heads, intermediate_size=64, num_attention_heads=heads, head_dim=8,
        num_key_value_heads=sizes["num_key_value_heads"] // 4, vocab_size=104, dtype=torch.float32,
    )  # fmt: skip
    randomize(model, 0, 0.2)
    with torch.no_grad():
        model.lm_head.weight[[0, 2, 3, 4]] = 0
    rt = Runtime(model, _tokenizer(name), kv_memory="128MiB")
    frame = chat_frame(rt.tokenizer, end_tokens(rt))
    assert frame.system == "system"
    assert frame.default_system == ("You are a helpful assistant." if name == "qwen2-7b" else None)
    given = RunConfig.load(EXAMPLES / f"{name}.toml")
    assert instruction_room(rt, frame, given) > 512
    config = dataclasses.replace(
        given,
        directions=dataclasses.replace(given.directions, features=12),
        instructions=dataclasses.replace(given.instructions, draws=16, max_new_tokens=160),
        filter=dataclasses.replace(given.filter, keep=0.3),
        pairs=dataclasses.replace(given.pairs, max_new_tokens=12),
    )
    result = run(config, tmp_path / "run", rt=rt)
    assert result.manifest["controlled_layers"] == {"9:20": list(range(9, 20))}
    records = list(result.records())
    assert records
    assert {(r["strength_positive"], r["strength_negative"]) for r in records} == {(0.1, -0.05)}
    assert any("system prompt of its own" in note for note in result.manifest["notes"]) == (name == "qwen2-7b")


def test_training_on_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """examples/train_dpo.py on the shipped model: a model comes out that loads, and another than went in."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "given.txt").write_text("\n".join(f"What is the trade of {name}?" for name in "ABCDEFGHIJ"))
    table = {
        "model": "tiny",
        "runtime": {"threads": 1, "kv_memory": "64MiB"},
        "instructions": {"file": str(tmp_path / "given.txt")},
        "pairs": {"max_new_tokens": 24},
        "baseline": {"recipe": "opposing_prompts"},
    }
    result = run(RunConfig.from_dict(table), tmp_path / "run")
    arguments = [str(result.path), "--out", str(tmp_path / "trained"), "--batch", "4", "--per-device", "2"]
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", *arguments, "--learning-rate", "1e-4", "--validation", "0.2"])
    runpy.run_path(str(EXAMPLES / "train_dpo.py"), run_name="__main__")
    assert "2 steps" in capsys.readouterr().out
    curve = [json.loads(line) for line in (tmp_path / "trained/curve.jsonl").read_text().splitlines()]
    assert {point["step"] for point in curve} == {1, 2}
    assert any("eval_rewards/accuracies" in point for point in curve)
    before = Runtime.from_pretrained(tiny.path(), kv_memory="32MiB")
    after = Runtime.from_pretrained(tmp_path / "trained", kv_memory="32MiB")
    prompt = [[{"role": "user", "content": "Why?"}]]
    assert not torch.equal(before.hidden_states(prompt), after.hidden_states(prompt))
