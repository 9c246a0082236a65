"""End to end: pairs per second of `generate_pairs` beside transformers with forward hooks.

The contestants have the same weights, prompts, pushes, number of tokens and threads, and take turns in one process, so
that whatever else the machine does falls on all of them. Tokens are compared, not assumed to be equal.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from bench import hf, room, subjects
from bench.environment import environment, load, write
from bench.shapes import SHAPES
from icon2_rt import Runtime, Steering

CONTESTANTS = {
    "icon2_rt": "generate_pairs",
    "two_calls": "(a) transformers, two generate calls with forward hooks",
    "one_call": "(b) transformers, one generate call with a hook per row",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench pairs", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["tiny", "auto", *SHAPES], default="tiny",
                        help="auto: llama3-8b, or the largest that the GPU has room for")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--prompts", type=int, nargs="+", choices=sorted(subjects.LENGTHS), default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="rounds in which each contestant has one turn")
    parser.add_argument("--limit", type=float, default=120, help="begin no further round after so many seconds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="default: bench/results/pairs-MODEL-DEVICE.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()

    device = torch.device(options.device)
    told: dict[str, str] = {}
    if options.model == "auto" and device.type != "cuda":
        parser.error("--model auto asks a GPU what it has room for: give it --device cuda, or a model by name")
    if options.model == "auto":
        chosen, told = room.fitting(["llama3-8b"], room.pairs_needs, room.free_bytes(device))
        if not chosen:
            parser.error(f"this GPU has no room for any of the decoders: {told}")
        options.model = chosen[0]
    model = subjects.load(options.model, device)
    # On a GPU the other contestants need room for a model and a cache of their own.
    kv_memory = room.pairs_kv(options.model) if device.type == "cuda" else None
    backend = "triton" if device.type == "cuda" else "auto"
    runtime = Runtime(model, keep_model=True, device=device, backend=backend, kv_memory=kv_memory)
    steerings = subjects.steerings(model, subjects.prompts(options.model, 1)[0])
    record: dict[str, Any] = {
        "benchmark": "pairs",
        "model": subjects.describe(options.model, model),
        "settings": {
            "new_tokens": options.new_tokens,
            "repeats": options.repeats,
            "limit_seconds": options.limit,
            "sampling": "greedy, no eos token",
            "scope": "response",
            "blocks": steerings["positive"].layers,
            "doses": subjects.DOSES,
            "padding": "left, for both transformers contestants",
            "attention": model.config._attn_implementation,
            "backend": runtime.backend,
            "page_size": runtime.page_size,
            "contestants": CONTESTANTS,
            "no_room_for": told,
        },
        "environment": environment(device),
        "figures": [],
    }
    print(f"{options.model}, {torch.get_num_threads()} threads, load {load()}", file=sys.stderr)
    for n in options.prompts:
        prompts = subjects.prompts(options.model, n)
        figure = compare(runtime, model, prompts, steerings, options.new_tokens, options.repeats, options.limit)
        record["figures"].append(figure)
        print(line(figure), file=sys.stderr)
        write(f"pairs-{options.model}", record, options.out)  # what is measured stays, whatever happens later


def compare(
    runtime: Runtime,
    model: transformers.PreTrainedModel,
    prompts: list[list[int]],
    steerings: dict[str, Steering],
    new_tokens: int,
    repeats: int,
    limit: float,
) -> dict[str, Any]:
    """One row of the table: every contestant's seconds for all ``prompts``, and how far their tokens agree."""

    def ours(prompts: hf.Prompts) -> hf.Pairs:
        pairs = runtime.generate_pairs(prompts, **steerings, max_new_tokens=new_tokens, do_sample=False)
        return [(pair.positive.token_ids, pair.negative.token_ids) for pair in pairs]

    runs: dict[str, Callable[[hf.Prompts], hf.Pairs]] = {
        "icon2_rt": ours,
        "two_calls": lambda prompts: hf.two_calls(model, prompts, **steerings, new_tokens=new_tokens),
        "one_call": lambda prompts: hf.one_call(model, prompts, **steerings, new_tokens=new_tokens),
    }
    for run in runs.values():
        run(prompts[:1])  # warm-up
    tokens: dict[str, hf.Pairs] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}  # steadier than the clock on a shared machine
    names = list(runs)
    before = load()
    end = time.perf_counter() + limit
    for turn in range(repeats):
        if turn and time.perf_counter() > end:
            break
        for name in names[turn % 3 :] + names[: turn % 3]:
            gc.collect()
            begin, cpu_begin = time.perf_counter(), time.process_time()
            tokens[name] = runs[name](prompts)
            seconds[name].append(time.perf_counter() - begin)
            cpu_seconds[name].append(time.process_time() - cpu_begin)
    n = len(prompts)
    return {
        "prompts": n,
        "prompt_lengths": [len(p) for p in prompts],
        "new_tokens": new_tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "pairs_per_second": {name: summary([n / s for s in values]) for name, values in seconds.items()},
        "speedup": {name: ratio(seconds, name) for name in names[1:]},
        "speedup_cpu_time": {name: ratio(cpu_seconds, name) for name in names[1:]},
        "agreement": {
            name: agreement(model, prompts, tokens["icon2_rt"], tokens[name], steerings) for name in names[1:]
        },
        "load": {"before": before, "after": load()},
    }


def ratio(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    """How many times as long as ours ``name`` took, round by round."""
    return summary([theirs / ours for ours, theirs in zip(seconds["icon2_rt"], seconds[name], strict=True)])


def summary(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def agreement(
    model: transformers.PreTrainedModel,
    prompts: list[list[int]],
    ours: hf.Pairs,
    theirs: hf.Pairs,
    steerings: dict[str, Steering],
) -> dict[str, Any]:
    """Shares of equal tokens and of rows that are equal throughout. Where two rows part, the lead of the best next
    token over the second (in logits) says whether rounding decided: the largest such lead is given."""
    equal = same_rows = total = 0
    leads = []
    for prompt, pair, other in zip(prompts, ours, theirs, strict=True):
        for branch, a, b in zip(("positive", "negative"), pair, other, strict=True):
            total += len(a)
            equal += sum(x == y for x, y in zip(a, b, strict=True))
            same_rows += a == b
            if a != b:
                first = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
                leads.append(hf.gap_at(model, [*prompt, *a[:first]], steerings[branch], len(prompt)))
    branches = sum(pair[0] != pair[1] for pair in ours)
    return {
        "tokens": equal / total,
        "rows": same_rows / (2 * len(prompts)),
        "largest_lead_where_rows_part": max(leads, default=None),
        "pairs_whose_branches_differ": branches / len(ours),
    }


def line(figure: dict[str, Any]) -> str:
    rates = figure["pairs_per_second"]
    speed = ", ".join(f"{name} {rates[name]['median']:.3f}" for name in rates)
    ratios = ", ".join(
        f"{s['median']:.2f}× ({s['min']:.2f}–{s['max']:.2f}) {name}" for name, s in figure["speedup"].items()
    )
    ratios += "; CPU time " + ", ".join(f"{s['median']:.2f}×" for s in figure["speedup_cpu_time"].values())
    same = ", ".join(f"{a['tokens']:.4f}" for a in figure["agreement"].values())
    return f"{figure['prompts']:3} prompts: pairs/s {speed}; {ratios}; equal tokens {same}; load {figure['load']}"


if __name__ == "__main__":
    main()
