"""What the GPU at hand proves: the trial of every kernel and of a whole engine, at the sizes of real decoders.

The verdicts are stored as at a user's first start, so that what comes after (`backend="auto"`) finds them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment, write
from bench.shapes import SHAPES
from icon2_rt import qualify
from icon2_rt.qualify import facts

MODELS = ("llama3-8b", "qwen2-7b", "qwen2-1.5b")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench qualify", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SHAPES), nargs="+", default=list(MODELS))
    parser.add_argument("--limit", type=float, default=300, help="begin no further trial after so many seconds")
    parser.add_argument("--out", type=Path, help="a folder or a file; default: bench/results/")
    parser.add_argument(
        "--dry", action="store_true", help="on the CPU, where nothing can be tried: to see that it runs"
    )
    options = parser.parse_args(argv)
    if options.dry and options.out is None:
        parser.error("--dry finds nothing that is worth keeping among the results: give it --out FOLDER")
    if not options.dry and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, and torch finds none here; --dry runs the same code without one")
    deadline = time.monotonic() + options.limit
    device = torch.device("cpu" if options.dry else "cuda")
    figures: list[dict[str, Any]] = []
    for model in ["dry"] if options.dry else options.model:
        if figures and time.monotonic() > deadline:
            figures.append({"model": model, "status": "not reached: out of time"})
        else:
            here = facts.DeviceFacts("a CPU") if options.dry else facts.read(device)
            subject = qualify.Subject(SHAPES[model], "bfloat16")
            verdict = qualify.qualify(subject, here, asked=True, again=True)
            figures.append({"model": model, **verdict.to_dict()})
            print(f"{model}: {verdict} ({verdict.seconds:.0f} s)")
            for line in lines(verdict):
                print(f"  {line}")
        settings = {"dtype": "bfloat16", "dry": options.dry}
        # Asked for the environment only now: in exclusive mode the trial's process needs the device for itself.
        record = {"benchmark": "qualify", "settings": settings, "environment": environment(device), "figures": figures}
        write("qualify", record, options.out)
    if not options.dry and any(figure["status"] != "proven" for figure in figures):
        sys.exit("not everything was proven: the reasons stand above")


def lines(verdict: qualify.Qualification) -> list[str]:
    """A line for each form that was tried: chosen or not, its error, its times, or what is wrong."""
    found = []
    for form in verdict.forms_tried:
        chosen = form.form in (verdict.forms.get(form.op), verdict.prefill if form.op == "prefill_attention" else None)
        times = ", ".join(f"{micros:.1f} µs at {rows} rows" for rows, micros in form.microseconds.items())
        error = "" if form.error is None else f"error {form.error:.1e}"
        parts = [form.wrong or "right", error, times]
        found.append(f"{'*' if chosen else ' '} {form.op} ({form.form}): {'; '.join(part for part in parts if part)}")
    for engine in verdict.engines_tried:
        times = ", ".join(f"{name} {micros:.0f} µs" for name, micros in engine.microseconds.items())
        graphs = "with graphs" if engine.graphs else "without graphs"
        found.append(f"  engine {graphs}: {'; '.join(part for part in (engine.wrong or 'right', times) if part)}")
    return found


if __name__ == "__main__":
    main()
