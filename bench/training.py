"""Does training on the pairs make the model better, and what do the pairs cost? The method beside the four baselines,
on the same instructions and the same engine, judged by the world's oracle.

5. Training: DPO with TRL on each dataset; the oracle's mean score of the trained model's unsteered answers to
   instructions of the world, and the curve of the reward accuracy. Every recipe makes several datasets, which differ in
   everything that is drawn, and every dataset is trained on with several seeds.
6. Costs: what a pair of each recipe cost, in three accountings. Seconds, which take a quiet machine, are in
   ``bench/seconds.py``.

best_of_n asks the oracle itself: no reward model can be better. Everything else never sees it, the strengths of the
method included, which a calibration chooses.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

import torch

from bench.environment import environment, write
from bench.proof import BANDS, MAX_DIVERGENCE, model_folder
from icon2_rt import Runtime, tiny
from icon2_rt.pipeline import costs
from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.runner import RunResult, finished_run, run
from icon2_rt.tiny import oracle, world

# The strengths are doses of the model's residual norm.
CALIBRATION = {
    "doses": [0.1, 0.15, 0.2, 0.25],
    "bands": list(BANDS),
    "max_divergence": MAX_DIVERGENCE,
    "instructions": 60,
}
ANSWERS = {"max_new_tokens": 64, "temperature": 0.8, "top_p": 0.95}
# The method as in the paper, with noise of its own for each response of a pair, and with the same for both.
METHODS: Mapping[str, Mapping[str, Any]] = {"icon2": {}, "icon2_common_noise": {"noise": "common"}}
BASELINES: Mapping[str, Mapping[str, Any]] = {
    "opposing_prompts": {},
    "best_of_n": {"judge": "bench.training:verdicts"},
    "self_rewarding": {"self_judge": "likelihood"},
    "self_refine": {},
}
# A model of 1.1M parameters takes a far larger step than the paper's 5e-7, and a dataset this small smaller batches.
TRAINING = {"beta": 0.1, "learning_rate": 3e-4, "batch": 16, "epochs": 2}
LOGGED = 4  # steps between two points of the reward accuracy's curve, each the mean over them


def verdicts(instructions: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The oracle as a judge."""
    return [oracle.judge(i, r).score for i, r in zip(instructions, responses, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench training", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="seed0", help="as of python -m bench proof")
    parser.add_argument("--draws", type=int, default=500, help="instructions that the model writes; half are kept")
    parser.add_argument("--asked", type=int, default=200, help="instructions that the trained models answer")
    parser.add_argument("--datasets", type=int, default=3, help="datasets of each recipe")
    parser.add_argument("--seeds", type=int, default=3, help="trainings on each dataset")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES))
    parser.add_argument(
        "--runs", type=Path, help="a folder to keep the runs in; finished ones there are taken as they are"
    )
    parser.add_argument("--out", type=Path, help="default: bench/results/training-MODEL-DEVICE.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made = [
            datasets((options.runs or Path(folder)) / str(seed), options.model, options.draws, options.baselines, seed)
            for seed in range(options.datasets)
        ]
        asked = instructions(options.asked)
        rt = Runtime.from_pretrained(model_folder(options.model))
        record = {
            "benchmark": "training",
            "model": {"name": options.model, "fingerprint": rt.fingerprint},
            "settings": {
                **vars(options), "out": None, "runs": None, "training": TRAINING, "calibration": CALIBRATION,
                "answers": ANSWERS,
            },
            "environment": environment(),
            "untrained": marks(rt, asked),
            "strengths": {name: [strengths(runs[name]) for runs in made] for name in METHODS},
            "trained": {
                name: trained([runs[name] for runs in made], model_folder(options.model), asked, options.seeds)
                for name in made[0]
            },
            "costs": bills(made[0], ("tokens", "flops")),
            "ratio": costs.ratio(made[0]["icon2"]),
        }  # fmt: skip
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    write(f"training-{options.model}", record, options.out)


def datasets(folder: Path, model: str, draws: int, names: Sequence[str], seed: int) -> dict[str, RunResult]:
    """The method's run, and on the instructions that it kept its other form and each baseline."""
    common = {
        "model": str(model_folder(model)),
        "seed": seed,
        "criteria": {name: {"positive": p, "negative": n} for name, (p, n) in tiny.CRITERIA.items()},
        "runtime": {"threads": 1, "kv_memory": "256MiB"},
    }
    runs = {}
    for name, options in METHODS.items():
        method = {
            **common,
            "directions": {"features": 128},
            "instructions": {"draws": draws, "max_new_tokens": 48},
            "filter": {"scale": "contrast", "keep": 0.5},
            "pairs": {"unit": "dose", **ANSWERS, **options},
            "calibration": CALIBRATION,
        }
        runs[name] = _timed(name, method, folder)
    given = {"file": str(folder / "icon2" / "kept.jsonl")}
    for name in names:
        table = {**common, "instructions": given, "pairs": ANSWERS, "baseline": {"recipe": name, **BASELINES[name]}}
        runs[name] = _timed(name, table, folder)
    return runs


def _timed(name: str, table: Mapping[str, Any], folder: Path) -> RunResult:
    if (folder / name / "report.json").exists():
        return finished_run(folder / name)
    began = time.perf_counter()
    result = run(RunConfig.from_dict(table), folder / name)
    print(
        f"{folder.name}/{name}: {result.report['counts']['pairs']} pairs, {time.perf_counter() - began:.0f} s",
        file=sys.stderr,
    )
    return result


def instructions(count: int) -> list[str]:
    """Instructions of the world that no dataset is made of: drawn from it, not from the model."""
    rng = random.Random(1)
    return [getattr(text, "text", text) for text in (world.sample_instruction(rng) for _ in range(count))]


def bills(runs: Mapping[str, RunResult], units: Sequence[costs.Unit]) -> dict[str, Any]:
    """What a pair of the method and of each baseline cost, by unit; the method's forms cost the same."""
    others = [runs[name] for name in runs if name not in METHODS]
    return {unit: costs.compare(runs["icon2"], others, unit) for unit in units}


def strengths(result: RunResult) -> dict[str, Any]:
    """The band and the doses that the calibration chose."""
    found = json.loads((result.path / "strengths.json").read_text())["calibration"]
    return {key: found[key] for key in ("band", "positive_dose", "negative_dose", "notes")}


def marks(rt: Runtime, asked: Sequence[str]) -> dict[str, Any]:
    """The oracle on unsteered answers, with the same random numbers for every model; also by kind of instruction."""
    chats = [[{"role": "user", "content": text}] for text in asked]
    answers = rt.generate(chats, seed=7, top_k=0, **ANSWERS)
    judged = [oracle.judge(text, answer.text or "") for text, answer in zip(asked, answers, strict=True)]
    return {
        "score": fmean(verdict.score for verdict in judged),
        "well_formed": fmean(verdict.well_formed for verdict in judged),
        "kinds": {kind: fmean(v.score for v in judged if v.kind == kind) for kind in {v.kind for v in judged}},
    }


def trained(results: Sequence[RunResult], model: Path, asked: Sequence[str], seeds: int) -> dict[str, Any]:
    """A recipe's datasets, each trained on with each seed. The spread over trainings on one dataset (the pooled
    standard deviation) and the one over datasets (that of their means) are said apart."""
    found = []
    for result in results:
        scores = []
        for seed in range(seeds):
            began = time.perf_counter()
            policy, tokenizer, curve = _train(result, model, seed)
            scores.append({**marks(Runtime(policy, tokenizer), asked), "reward_accuracy": curve})
            took = time.perf_counter() - began
            print(f"{result.path.name}, seed {seed}: {scores[-1]['score']:.3f} in {took:.0f} s", file=sys.stderr)
        found.append(
            {
                "pairs": result.report["counts"]["pairs"],
                "oracle": _pairs_by_oracle(result),
                "mean": fmean(score["score"] for score in scores),
                "seeds": scores,
            }
        )
    within = [variance([s["score"] for s in f["seeds"]]) for f in found] if seeds > 1 else []
    return {
        "mean": fmean(f["mean"] for f in found),
        "spread_over_trainings": fmean(within) ** 0.5 if within else None,
        "spread_over_datasets": stdev([f["mean"] for f in found]) if len(found) > 1 else None,
        "datasets": found,
    }


def _pairs_by_oracle(result: RunResult) -> dict[str, float]:
    """What the oracle thinks of the pairs whose instruction it can read: both well formed; of those that are and differ
    in score, chosen better; and the mean score of either side, broken texts 0."""
    judged = [
        [oracle.judge(r["prompt"][0]["content"], r[side][0]["content"]) for side in ("chosen", "rejected")]
        for r in result.records()
    ]
    judged = [(c, r) for c, r in judged if c.kind is not None]
    differ = [(c, r) for c, r in judged if c.well_formed and r.well_formed and c.score != r.score]
    return {
        "both_well_formed": fmean(c.well_formed and r.well_formed for c, r in judged),
        "chosen_better": sum(c.score > r.score for c, r in differ) / max(1, len(differ)),
        "chosen": fmean(c.score for c, _ in judged),
        "rejected": fmean(r.score for _, r in judged),
    }


def _train(result: RunResult, model: Path, seed: int) -> tuple[Any, Any, list[tuple[int, float]]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [
        {key: record[key] for key in ("prompt", "chosen", "rejected")}
        for record in result.records()
        if record["chosen"] != record["rejected"]
    ]
    tokenizer = AutoTokenizer.from_pretrained(model)
    steps = int(TRAINING["epochs"] * len(rows) / TRAINING["batch"])
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, beta=TRAINING["beta"], learning_rate=TRAINING["learning_rate"],
            lr_scheduler_type="cosine", warmup_steps=round(0.1 * steps), num_train_epochs=TRAINING["epochs"],
            per_device_train_batch_size=int(TRAINING["batch"]), logging_steps=LOGGED, save_strategy="no", report_to=[],
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=seed, data_seed=seed,
        )  # fmt: skip
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(model),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    curve = [(e["step"], e["rewards/accuracies"]) for e in trainer.state.log_history if "rewards/accuracies" in e]
    return trainer.model, tokenizer, curve


if __name__ == "__main__":
    main()
