"""Peak memory of a steered pair beside two single runs, each way in a fresh process.

A process loads the model, warms up on a short prompt, asks the kernel to forget its peak so far, runs once and reads
the new peak: the difference to what was resident before is what the run itself needed (KV, activations, buffers).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from bench import ROOT, hf, subjects
from bench.environment import environment, load, write
from icon2_rt import Runtime

WAYS = {
    "pair": "icon2_rt, generate_pairs: both branches over one prompt KV",
    "two_singles": "icon2_rt, generate twice, one after the other",
    "two_unshared": "icon2_rt, generate once with the prompt given twice: two rows that share nothing",
    "hf_two_calls": "(a) transformers, two generate calls with forward hooks",
    "hf_one_call": "(b) transformers, one generate call with a hook per row",
}
CPU = torch.device("cpu")
# Long enough that KV is a visible part of the peak.
PROMPT_TOKENS = {"tiny": 900, "random100m": 1024}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["tiny", "random100m"], default="random100m")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="default: bench/results/memory-MODEL-DEVICE.json")
    parser.add_argument("--way", choices=WAYS, help="run this one here and print what it took (what the others do)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    if options.way:
        print(json.dumps(measure(options.way, options.model, options.prompts[0], options.new_tokens)))
        return

    figures = []
    for n in options.prompts:
        for way in WAYS:
            arguments = ["--way", way, "--model", options.model, "--prompts", str(n)]
            arguments += ["--new-tokens", str(options.new_tokens), "--threads", str(options.threads)]
            command = [sys.executable, "-m", "bench.memory", *arguments]
            printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            figure = {"prompts": n, "prompt_tokens": PROMPT_TOKENS[options.model], "way": way}
            figures.append({**figure, **json.loads(printed.splitlines()[-1]), "load": load()})
            print(figures[-1], file=sys.stderr)
    record = {
        "benchmark": "memory",
        "model": subjects.describe(options.model, subjects.load(options.model, CPU)),
        "settings": {"new_tokens": options.new_tokens, "ways": WAYS, "peak": "VmHWM after a reset"},
        "environment": environment(),
        "figures": figures,
    }
    write(f"memory-{options.model}", record, options.out)


def measure(way: str, name: str, n: int, new_tokens: int) -> dict[str, Any]:
    """MiB resident before the run, at its peak, and the difference."""
    model = subjects.load(name, CPU)
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(subjects.SEED)
    prompts = [torch.randint(vocab, (PROMPT_TOKENS[name],), generator=generator).tolist() for _ in range(n)]
    warm_up = [prompt[:8] for prompt in prompts]
    steerings = subjects.steerings(model, warm_up[0])
    if way.startswith("hf_"):
        contestant = hf.two_calls if way == "hf_two_calls" else hf.one_call

        def run(prompts: list[list[int]], new_tokens: int) -> None:
            contestant(model, prompts, **steerings, new_tokens=new_tokens)

    else:
        runtime = Runtime(model, device="cpu")
        sides = list(steerings.values())

        def run(prompts: list[list[int]], new_tokens: int) -> None:
            if way == "pair":
                runtime.generate_pairs(prompts, **steerings, max_new_tokens=new_tokens, do_sample=False)
            elif way == "two_singles":
                for side in sides:
                    runtime.generate(prompts, side, max_new_tokens=new_tokens, do_sample=False)
            else:
                doubled = [prompt for prompt in prompts for _ in sides]
                runtime.generate(doubled, sides * len(prompts), max_new_tokens=new_tokens, do_sample=False)

    run(warm_up, 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _status("VmRSS")
    run(prompts, new_tokens)
    peak = _status("VmHWM")
    return {"before_mib": round(before, 1), "peak_mib": round(peak, 1), "run_mib": round(peak - before, 1)}


def _status(field: str) -> float:
    """A field of /proc/self/status, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main()
