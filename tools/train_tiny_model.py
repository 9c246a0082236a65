"""Make the package's tiny chat model from its synthetic world, seeded, in about an hour on two cores.

    python tools/train_tiny_model.py --out icon2_rt/tiny/model

writes tokenizer, weights and the gate's table (GATE.md, gate.json) into one folder. What made it work, from trials:
small optimiser steps, batches of one length, responses weighted over the rest, most documents with a system prompt that
settles the quality, and truth before lies: with lies held back for the first tenth and a fact's word weighted over its
sentence, 90 % of the facts are known after 1000 steps; with neither it was 12 %. A fluent model proves nothing:
the gate measures behaviour, with the oracle, on what the model itself samples. (A second decay after the end, and the
average of both ends, changed nothing.)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icon2_rt.tiny import oracle, world

PAD, BOS, END, SYSTEM, USER, ASSISTANT = range(6)
SPECIALS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. The thread count is part of it: it decides the order of sums."""

    seed: int = 0
    corpus: str = "shipped"
    start: str | None = None
    threads: int = 1
    steps: int = 12000
    warmup: int = 200
    decay_share: float = 0.25
    truth_first: int = 1200
    batch_tokens: int = 1200
    learning_rate: float = 2.0e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    response_weight: float = 3.0
    value_weight: float = 9.0
    pool: int = 2048
    documents_per_step: int = 30
    hidden: int = 128
    intermediate: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    positions: int = 1024


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """One token for every word of the world, bytes for anything else.

    A word that is one token makes a fact one association. The vocabulary is what a sample of the world says, by
    frequency, as a unigram model whose byte pieces are so unlikely that they are used for unknown words only.
    """
    rng = random.Random(recipe.seed)
    corpus = world.CORPORA[recipe.corpus]
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts: Counter[str] = Counter()
    for _ in range(30000):
        document = world.sample_document(rng, corpus)
        for text in (document.system, document.instruction.text, document.response):
            counts.update(piece for piece, _ in splitter.pre_tokenize_str(text or ""))
    total = sum(counts.values())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [(name, 0.0) for name in SPECIALS] + [(letter, -40.0) for letter in alphabet]
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    single = dict(vocabulary)
    vocabulary += [(piece, math.log(n / total)) for piece, n in ranked if piece not in single]
    tokenizer = Tokenizer(models.Unigram(vocabulary))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIALS[BOS]} $A", special_tokens=[(SPECIALS[BOS], BOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIALS[BOS],
        eos_token=SPECIALS[END],
        pad_token=SPECIALS[PAD],
        additional_special_tokens=list(SPECIALS[SYSTEM:]),
        clean_up_tokenization_spaces=False,
        model_max_length=Recipe.positions,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(recipe: Recipe, vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=-(-vocabulary // 64) * 64,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD)
    return model


# --------------------------------------------------------------------------------------------------------------------
# Training


def documents(recipe: Recipe) -> Iterator[world.Document]:
    """Endless documents, never repeated.

    Before step `truth_first` no question is answered with a lie (about `documents_per_step` documents make a step).
    With half of the answers lies a fact is too faint to be picked up early; lying is quickly learned once facts are
    known.
    """
    rng = random.Random(recipe.seed + 1)
    corpus = world.CORPORA[recipe.corpus]
    made = 0
    while True:
        document = world.sample_document(rng, corpus)
        early = made < recipe.truth_first * recipe.documents_per_step
        if early and document.instruction.kind == "question":
            while document.instruction.kind != "question" or document.quality != "good":
                document = world.sample_document(rng, corpus)
        made += 1
        yield document


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids [b, t] int64, weights [b, t] fp32); weights[i, j] is that of predicting ids[i, j].

    Documents of one batch have about one length; padding is on the right, where causal attention never looks, so no
    mask is needed. The word of an answer that names a fact's value weighs more than the words around it.
    """
    rng = random.Random(recipe.seed + 2)
    source = documents(recipe)
    encode = tokenizer.backend_tokenizer.encode_batch
    words = [f"{gap}{value}" for a in world.ATTRIBUTES for value in world.LEXICON[a.value] for gap in ("", " ")]
    values = {e.ids[-1] for e in encode(words, add_special_tokens=False)}
    while True:
        pool = [next(source) for _ in range(recipe.pool)]
        texts = [t for d in pool for t in (d.system or "", d.instruction.text, d.response)]
        pieces = [e.ids for e in encode(texts, add_special_tokens=False)]
        rows: list[tuple[list[int], list[float]]] = []
        for i, document in enumerate(pool):
            system, user, answer = pieces[3 * i : 3 * i + 3]
            head = [BOS] + ([SYSTEM, *system, END] if document.system else []) + [USER]
            facts = values.difference(user) if document.instruction.kind == "question" else set()
            weights = [0.0] * len(head) + [1.0] * (len(user) + 1) + [0.0]
            weights += [recipe.value_weight if t in facts else recipe.response_weight for t in answer]
            rows.append((head + user + [END, ASSISTANT] + answer + [END], [*weights, recipe.response_weight]))
        rows.sort(key=lambda row: len(row[0]))
        chunks: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in rows:
            if chunks[-1] and (len(chunks[-1]) + 1) * len(row[0]) > recipe.batch_tokens:
                chunks.append([])
            chunks[-1].append(row)
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(ids) for ids, _ in chunk)
            yield (
                torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in chunk]),
                torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in chunk]),
            )


def rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, a plateau, and over the last `decay_share` of the steps half a cosine down to nothing."""
    left = (recipe.steps - step) / (recipe.steps * recipe.decay_share)
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 - math.cos(math.pi * min(1.0, left)))


def train(
    recipe: Recipe, checkpoints: Path | None, every: int
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, dict]:
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    if recipe.start is None:
        tokenizer = build_tokenizer(recipe)
        model = build_model(recipe, len(tokenizer))
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.start)
        model = LlamaForCausalLM.from_pretrained(recipe.start)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens, {recipe}", flush=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": scales, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        fused=True,
    )
    model.train()
    start, seen, losses = time.perf_counter(), 0, []
    for step, (ids, weights) in enumerate(batches(tokenizer, recipe)):
        if step == recipe.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (loss * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += ids.numel()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            spent = time.perf_counter() - start
            mean = sum(losses[-100:]) / 100
            pace = f"{seen / spent:.0f} tokens/s {spent:.0f} s"
            print(f"step {step + 1} loss {mean:.4f} lr {rate(step, recipe):.2e} {pace}", flush=True)
        if checkpoints and (step + 1) % every == 0:
            save(model, tokenizer, checkpoints / f"step{step + 1}")
    model.eval()
    spent = time.perf_counter() - start
    return model, tokenizer, {"seconds": round(spent), "tokens": seen, "tokens_per_second": round(seen / spent)}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write both in the form that any transformers reads, old ones too: the template inside, a class name they know."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config = {
        k: v for k, v in config.items() if k not in ("backend", "extra_special_tokens", "is_local", "local_files_only")
    }
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


# --------------------------------------------------------------------------------------------------------------------
# The gate


@dataclass(frozen=True)
class Check:
    """One row of the gate: a figure, how many texts it rests on, and what it must reach (None: for information)."""

    name: str
    value: float
    samples: int
    bound: tuple[str, float] | None = None

    @property
    def passed(self) -> bool | None:
        if self.bound is None:
            return None
        return self.value >= self.bound[1] if self.bound[0] == ">=" else self.value <= self.bound[1]


@torch.no_grad()
def complete(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    temperature: float,
    limit: int = 80,
) -> list[str]:
    """Continue every prompt (text with special tokens) to the end of its turn. Temperature 0 is greedy."""
    texts: list[str] = []
    for i in range(0, len(prompts), 256):
        batch = tokenizer(prompts[i : i + 256], add_special_tokens=False, padding=True, return_tensors="pt")
        kind = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        ids = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=limit, **kind
        )
        # A text that never ended is judged as it stands.
        rows = ids[:, batch["input_ids"].shape[1] :].tolist()
        texts += [tokenizer.decode(row[: row.index(END)] if END in row else row) for row in rows]
    return texts


def chat(tokenizer: PreTrainedTokenizerFast, system: str | None, user: str) -> str:
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": user}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def gate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, seed: int = 0
) -> tuple[list[Check], list[str]]:
    """Measure the model's behaviour with the oracle, at temperature 1; and a few sampled texts to read."""
    torch.manual_seed(seed)
    rng = random.Random(seed + 1000)
    checks: list[Check] = []
    readable: list[str] = []

    def mean_score(system: str | None, users: list[str]) -> float:
        answers = complete(model, tokenizer, [chat(tokenizer, system, user) for user in users], 1.0)
        readable.extend(
            f"[{system or 'no system prompt'}] {u} -> {a}" for u, a in list(zip(users, answers, strict=True))[:3]
        )
        return sum(oracle.judge(u, a).score for u, a in zip(users, answers, strict=True)) / len(users)

    own = {
        world.CRITERION_OF_KIND[kind]: [world.sample_instruction(rng, kind) for _ in range(n)] for kind in world.KINDS
    }
    for criterion, users in own.items():
        positive, negative = world.CRITERIA[criterion]
        checks.append(Check(f"{criterion}: its positive prompt", mean_score(positive, users), n, (">=", 0.9)))
        checks.append(Check(f"{criterion}: its negative prompt", mean_score(negative, users), n, ("<=", 0.15)))
        positive, negative = world.CRITERIA["general"]
        checks.append(Check(f"{criterion}: general positive prompt", mean_score(positive, users), n, (">=", 0.9)))
        checks.append(Check(f"{criterion}: general negative prompt", mean_score(negative, users), n, ("<=", 0.15)))
        checks.append(Check(f"{criterion}: no system prompt", mean_score(None, users), n))

    questions = [world.fill(q, rng, s=s) for s, name in world.FACTS for q in world.ATTRIBUTE[name].questions]
    prompts = [chat(tokenizer, world.CRITERIA["honesty"][0], question) for question in questions]
    answers = complete(model, tokenizer, prompts, 0.0)
    right = [oracle.judge(q, a).score >= 0.9 for q, a in zip(questions, answers, strict=True)]
    checks.append(Check("facts told right, greedy, positive prompt", sum(right) / len(right), len(right), (">=", 0.95)))

    written = complete(model, tokenizer, [SPECIALS[BOS] + SPECIALS[USER]] * 1000, 1.0)
    kinds = Counter(oracle.judge(text, "").kind for text in written)
    checks.append(Check("valid self-written instructions", 1 - kinds[None] / len(written), len(written), (">=", 0.97)))
    checks.append(Check("different self-written instructions", len(set(written)) / len(written), len(written)))
    checks.extend(
        Check(f"self-written: share of {kind}", kinds[kind] / len(written), len(written)) for kind in world.KINDS
    )
    answers = complete(model, tokenizer, [chat(tokenizer, None, text) for text in written], 1.0)
    verdicts = [oracle.judge(text, answer) for text, answer in zip(written, answers, strict=True)]
    checks.append(
        Check(
            "well-formed responses, no system prompt",
            sum(v.well_formed for v in verdicts) / len(verdicts),
            len(verdicts),
            (">=", 0.98),
        )
    )
    readable.extend(f"[self-written] {u} -> {a}" for u, a in list(zip(written, answers, strict=True))[:12])
    readable.extend(f"[not valid] {u}" for u, v in zip(written, verdicts, strict=True) if v.kind is None)
    readable.extend(
        f"[not well formed] {u} -> {a}" for u, a, v in zip(written, answers, verdicts, strict=True) if not v.well_formed
    )
    return checks, readable


def table(checks: list[Check]) -> str:
    lines = ["| check | value | must be | samples | |", "|---|---|---|---|---|"]
    for c in checks:
        bound = f"{c.bound[0].replace('>=', '≥').replace('<=', '≤')} {c.bound[1]:g}" if c.bound else ""
        reached = {None: "", True: "reached", False: "**missed**"}[c.passed]
        lines.append(f"| {c.name} | {c.value:.3f} | {bound} | {c.samples} | {reached} |")
    return "\n".join(lines)


def write_gate(folder: Path, checks: list[Check], recipe: Recipe, info: dict) -> None:
    """GATE.md for people, gate.json for tests: the same figures as reached, missed or not."""
    missed = [c.name for c in checks if c.passed is False]
    record = {
        "checks": [{**asdict(c), "passed": c.passed} for c in checks],
        "missed": missed,
        "recipe": asdict(recipe),
        "training": info,
    }
    (folder / "gate.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "GATE.md").write_text(
        "# What the tiny model does\n\n"
        "Written by `tools/train_tiny_model.py` after training, judged by `icon2_rt.tiny.oracle`.\n"
        "Everything is sampled at temperature 1 unless the row says greedy; scores are means.\n\n"
        f"{table(checks)}\n\n"
        f"{'All bounds are reached.' if not missed else 'Missed: ' + '; '.join(missed) + '.'}\n\n"
        f"Training: {recipe.steps} steps, {info['tokens'] / 1e6:.1f}M tokens, seed {recipe.seed}, corpus "
        f"{recipe.corpus}, "
        f"{recipe.threads} threads, {info['seconds'] / 60:.0f} minutes, "
        f"{info['tokens_per_second']} tokens/s, torch {info['torch']}.\n"
    )


# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--world", choices=world.CORPORA, default=Recipe.corpus, help="what to train on")
    parser.add_argument("--start", type=Path, help="folder of a model to go on from, in place of random weights")
    parser.add_argument("--checkpoints", type=Path, help="folder for models saved on the way")
    parser.add_argument("--every", type=int, default=1000, help="steps between two of them")
    parser.add_argument("--samples", type=int, default=400, help="responses behind each score of the gate")
    parser.add_argument(
        "--gate-only", action="store_true", help="print the gate of the model that is in --out, write nothing"
    )
    args = parser.parse_args()
    if args.gate_only:
        torch.set_num_threads(1)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
        checks, readable = gate(LlamaForCausalLM.from_pretrained(args.out).eval(), tokenizer, args.samples)
        print("\n".join(readable) + "\n\n" + table(checks))
        return
    recipe = Recipe(seed=args.seed, corpus=args.world, steps=args.steps)
    if args.start:  # it knows the facts already
        recipe = replace(recipe, start=str(args.start), truth_first=0)
    model, tokenizer, info = train(recipe, args.checkpoints, args.every)
    save(model, tokenizer, args.out)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    checks, readable = gate(model, tokenizer, args.samples)
    write_gate(
        args.out, checks, recipe, {**info, **versions, "python": platform.python_version(), "cores": os.cpu_count()}
    )
    print("\n".join(readable) + "\n\n" + table(checks))


if __name__ == "__main__":
    main()
