"""Checkpoints that are not what their config says: right is what transformers makes of them, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from icon2_rt import Direction, Runtime, models, tiny
from icon2_rt.models import checkpoint
from tests.models import random_prompts, random_vectors, tiny_llama, tiny_qwen2, tiny_qwen3

PROMPT = [1, 40, 200, 77, 9]


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the shipped model's folder with other weights or config entries (None: the entry is taken out)."""

    def make(weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None, **config: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny.path(), folder)
        if weights is not None:
            file = folder / "model.safetensors"
            save_file(weights(load_file(file)), file, metadata={"format": "pt"})
        stored = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({k: v for k, v in stored.items() if v is not None}))
        return folder

    return make


def greedy(model: Any, prompt: list[int] = PROMPT, n: int = 12) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def ours(rt: Runtime, prompt: list[int] = PROMPT, n: int = 12) -> list[int]:
    return rt.generate([prompt], max_new_tokens=n, eos_token_id=[])[0].token_ids


# --- the head and the embedding --------------------------------------------------------------------------------------


def test_a_head_that_differs_under_a_tied_config_is_the_head(changed):
    folder = changed(tie_word_embeddings=True)
    right = greedy(AutoModelForCausalLM.from_pretrained(folder))
    rt = Runtime.from_pretrained(folder, kv_memory="4MiB")
    assert ours(rt) == right and not rt.spec.tied_embeddings
    tied = AutoModelForCausalLM.from_pretrained(folder)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert greedy(tied) != right  # so the embedding in the head's place would be seen


@pytest.mark.parametrize("build", [tiny_qwen3, lambda: tiny_llama(tie_word_embeddings=True)])
def test_a_head_that_was_trained_or_untied_in_memory(build):
    def untied() -> Any:
        model = build()
        head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
        model.lm_head.weight = nn.Parameter(0.3 * head, requires_grad=False)
        return model

    [prompt] = random_prompts([7])
    right = greedy(untied(), prompt)
    rt = Runtime(untied(), kv_memory="4MiB")
    assert ours(rt, prompt) == right and right != greedy(build(), prompt)
    assert rt._engine.model.weights.lm_head is not rt._engine.model.weights.embedding


@pytest.mark.parametrize("flag", [True, False])
def test_one_tensor_is_held_once(flag):
    def build() -> Any:
        model = tiny_llama(tie_word_embeddings=flag)
        model.lm_head.weight = model.model.embed_tokens.weight if not flag else model.lm_head.weight
        return model

    [prompt] = random_prompts([7])
    rt = Runtime(build(), kv_memory="4MiB")
    assert rt.spec.tied_embeddings and rt._engine.model.weights.lm_head is rt._engine.model.weights.embedding
    assert ours(rt, prompt) == greedy(build(), prompt)


def test_an_equal_copy_under_a_tied_config_is_held_once(changed):
    same = changed(lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}, tie_word_embeddings=True)
    assert Runtime.from_pretrained(same, kv_memory="4MiB").spec.tied_embeddings


# --- weights that are not all there ----------------------------------------------------------------------------------

DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (lambda w: {k: v for k, v in w.items() if k != DOWN}, rf"1 missing \({DOWN}\)"),
        (lambda w: {f"inner.net.{k}": v for k, v in w.items()}, r"57 missing \(lm_head.weight.*; 57 that it has no"),
        (lambda w: w | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}, "1 that it has no place .*q_proj"),
        (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, r"1 missing \(lm_head.weight\)"),
    ],
    ids=["one gone", "a prefix", "a bias too many", "the head"],
)  # fmt: skip
def test_weights_that_are_missing_or_too_many_are_named(changed, weights, says):
    with pytest.raises(ValueError, match=says):
        Runtime.from_pretrained(changed(weights), kv_memory="4MiB")


def test_weights_of_another_size_are_named_even_where_transformers_lets_them_pass(changed):
    folder = changed(lambda w: w | {DOWN: torch.zeros(128, 255)})
    with pytest.raises(ValueError, match=rf"1 of another size \({DOWN}\)"):
        Runtime.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    "weights",
    [
        lambda w: {k.removeprefix("model."): v for k, v in w.items()},  # as a base model stores them
        lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)},  # as old Llamas do
    ],
    ids=["a base model's names", "stored frequencies"],
)
def test_other_names_that_transformers_knows_are_no_reason_to_refuse(changed, weights):
    folder = changed(weights)
    right = greedy(AutoModelForCausalLM.from_pretrained(tiny.path()))
    assert greedy(AutoModelForCausalLM.from_pretrained(folder)) == right
    assert ours(Runtime.from_pretrained(folder, kv_memory="4MiB")) == right


# --- quantised, GGUF, adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "fp8", "nobody-knows"])
def test_a_quantised_folder_is_refused_before_its_weights_are_read(changed, method, monkeypatch):
    folder = changed(quantization_config={"quant_method": method, "bits": 4})
    (folder / "model.safetensors").unlink()  # not even looked for
    with pytest.raises(ValueError, match=rf"is quantised \({method}\).*original checkpoint"):
        Runtime.from_pretrained(folder)


def test_a_quantisation_that_is_asked_for_is_refused():
    with pytest.raises(ValueError, match=r"is quantised \(bitsandbytes\)"):
        Runtime.from_pretrained(tiny.path(), quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_what_de_quantises_while_it_loads_is_transformers_work(changed, monkeypatch):
    """What comes out of it is looked at like any other model."""

    class Config:
        quant_method, dequantize = "fp8", True

    folder = changed(quantization_config={"quant_method": "fp8"})
    load, asked = AutoModelForCausalLM.from_pretrained, []

    def dequantising(path: Any, quantization_config: Any, **options: Any) -> Any:
        asked.append(quantization_config)
        model, found = load(tiny.path(), **options)
        model.config.quantization_config = {"quant_method": "fp8"}
        return model, found

    monkeypatch.setattr(checkpoint.AutoModelForCausalLM, "from_pretrained", dequantising)
    config = Config()
    rt = Runtime.from_pretrained(folder, quantization_config=config, kv_memory="4MiB")
    assert asked == [config] and ours(rt) == greedy(load(tiny.path()))


def test_a_de_quantised_model_may_keep_its_config():
    model = tiny_llama()
    [prompt] = random_prompts([7])
    right = greedy(model, prompt)
    model.config.quantization_config = {"quant_method": "gguf"}
    assert ours(Runtime(model, kv_memory="4MiB"), prompt) == right


def test_a_quantised_model_in_memory_is_refused_by_its_modules():
    class QuantLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(48, 8, dtype=torch.int32))

    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gptq"}
    model.model.layers[1].mlp.up_proj = QuantLinear()
    with pytest.raises(ValueError, match=r"quantised \(gptq: model.layers.1.mlp.up_proj is a QuantLinear\)"):
        Runtime(model)


def test_gguf_files_are_refused_with_the_other_ways(tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    for given in ({"path": tmp_path / "small.gguf"}, {"path": tmp_path}, {"path": tmp_path, "gguf_file": "small.gguf"}):
        with pytest.raises(ValueError, match=r"small.gguf is a GGUF file.*Runtime\(model, tokenizer\)"):
            Runtime.from_pretrained(**given)


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapters_folder_says_what_it_is(tmp_path, beside_a_model):
    folder = tmp_path / "adapter"
    if beside_a_model:
        shutil.copytree(tiny.path(), folder)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "some/base", "peft_type": "LORA"})
    )
    with pytest.raises(ValueError, match=r"holds an adapter .of some/base.*merge it into its base model"):
        Runtime.from_pretrained(folder)


# --- which class it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architectures", [None, [], ["LLaMAForCausalLM"], ["LlamaModel"], ["LlamaForSequenceClassification"]]
)
def test_the_class_is_the_one_that_transformers_builds(changed, architectures):
    folder = changed(architectures=architectures)
    right = greedy(AutoModelForCausalLM.from_pretrained(folder))
    assert ours(Runtime.from_pretrained(folder, kv_memory="4MiB")) == right


def test_other_classes_are_refused_by_name_before_weights_are_read(changed):
    folder = changed(model_type="gpt2", architectures=["LlamaForCausalLM"])
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'GPT2LMHeadModel' is not supported. Supported: LlamaForCausalLM"):
        Runtime.from_pretrained(folder)


def test_a_class_of_somebody_elses_is_refused_though_its_name_is_known():
    stranger = type("LlamaForCausalLM", (type(tiny_llama()),), {"__module__": "remote.modeling"})
    model = tiny_llama()
    model.__class__ = stranger
    with pytest.raises(ValueError, match=r"'remote.modeling.LlamaForCausalLM' is not supported"):
        Runtime(model)


# --- the fingerprint -------------------------------------------------------------------------------------------------


def fingerprint(model: Any) -> str:
    return models.fingerprint(model, models.read_spec(model, models.family_of(model)))


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_qwen3])
def test_every_tensor_is_in_the_fingerprint(build):
    right = fingerprint(build())
    names = [name for name, _ in build().named_parameters()]
    assert len(names) > 38
    for name in names:
        model = build()
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(parameter.roll(1, dims=0) * 1.1)
        assert fingerprint(model) != right, name


def test_the_sample_is_spread_over_a_tensor():
    """Rows, columns and the end of a tensor that is too large to be hashed whole."""

    def build() -> Any:
        return tiny_llama(vocab_size=4096)

    right = fingerprint(build())
    for part in ((slice(-256, None), slice(None)), (slice(None), slice(17, 24)), (slice(2000, 2300), slice(None))):
        model = build()
        with torch.no_grad():
            model.model.embed_tokens.weight[part] += 1.0
        assert fingerprint(model) != right, part


def test_directions_of_the_first_kind_of_fingerprint_warn_that_nothing_can_be_told():
    rt = Runtime(tiny_llama(), kv_memory="4MiB")
    old = Direction("old", random_vectors(4, 48, seed=1), torch.ones(4), model="0123456789abcdef")
    with pytest.warns(UserWarning, match="older kind.*cannot be told"):
        rt.generate([PROMPT[:1]], 0.1 * old, max_new_tokens=1)
    other = Direction("other", random_vectors(4, 48, seed=1), torch.ones(4), model="w2-0123456789abcdef")
    with pytest.warns(UserWarning, match="made on another model"):
        rt.generate([PROMPT[:1]], 0.1 * other, max_new_tokens=1)
