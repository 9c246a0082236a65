"""DPO with TRL on a finished run, with the paper's settings: β 0.1, learning rate 5e-7 with a cosine schedule and 10 %
warm-up, batches of 128 pairs, one epoch, and 2 % of the pairs kept apart to see what is learned.

    pip install -c constraints.txt -e ".[train]"
    python examples/train_dpo.py runs/mine --out trained

The trained model lies in OUT, the curve of its reward accuracy in OUT/curve.jsonl: how often the implicit reward ranks
chosen above rejected, in training and on the pairs kept apart. In the paper it is .54 after 50 steps and .85 after 600;
beyond .97 by step 100 the pairs were separable by something trivial, and the model learned nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from icon2_rt.pipeline.loading import model_path
from icon2_rt.pipeline.runner import finished_run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--model", help="what to train; by default the run's own model, which wrote the pairs")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=5e-7)
    parser.add_argument("--batch", type=int, default=128, help="pairs a step")
    parser.add_argument("--per-device", type=int, default=4, help="pairs at once; a step is so many after another")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt and response; the rest is cut")
    parser.add_argument("--validation", type=float, default=0.02, help="share of the pairs that is kept apart")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.batch % asked.per_device:
        parser.error(f"--batch {asked.batch} is no multiple of --per-device {asked.per_device}")

    result = finished_run(asked.run)
    model = asked.model or model_path(result.manifest["identity"]["config"]["model"])
    cuda = torch.cuda.is_available()
    pairs = load_dataset(str(asked.run), split="train")
    pairs = pairs.filter(lambda pair: pair["chosen"] != pair["rejected"])  # these teach nothing
    parts = pairs.train_test_split(test_size=max(1, round(asked.validation * len(pairs))), seed=asked.seed)
    steps = math.ceil(asked.epochs * len(parts["train"]) / asked.batch)
    settings = DPOConfig(
        output_dir=str(asked.out),
        beta=asked.beta,
        learning_rate=asked.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.1 * steps),
        num_train_epochs=asked.epochs,
        per_device_train_batch_size=asked.per_device,
        per_device_eval_batch_size=asked.per_device,
        gradient_accumulation_steps=asked.batch // asked.per_device,
        max_length=asked.max_length,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=cuda,
        eval_strategy="steps",
        eval_steps=max(1, steps // 10),
        logging_steps=max(1, steps // 50),
        save_strategy="no",
        report_to=[],
        seed=asked.seed,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        args=settings,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    trainer.save_model()
    curve = [
        {"step": entry["step"], **{key: entry[key] for key in entry if key.endswith("rewards/accuracies")}}
        for entry in trainer.state.log_history
        if any(key.endswith("rewards/accuracies") for key in entry)
    ]
    (asked.out / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve))
    print(f"{len(parts['train'])} pairs, {trainer.state.global_step} steps; the model is in {asked.out}")


if __name__ == "__main__":
    main()
