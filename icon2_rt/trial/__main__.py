"""``python -m icon2_rt.trial``: the trial itself. Its verdict is drawn by whoever started it; ``--json`` prints it."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
from contextlib import nullcontext, suppress
from typing import Any

import torch

from icon2_rt.models import DecoderSpec
from icon2_rt.ops import assemble, available
from icon2_rt.qualify.cache import LLAMA_3_8B, Subject
from icon2_rt.qualify.verdict import EngineResult, FormResult, Qualification, choose_forms, choose_prefill, conclude
from icon2_rt.trial.decoder import weight_bytes
from icon2_rt.trial.forms import Effort, decoder_spec, out_of_memory, record, said_of, try_forms, try_prefill
from icon2_rt.trial.tell import Teller
from icon2_rt.trial.whole import try_engine

GPU = Effort(rows=(2, 16, 64), replays=50, times=7)
CPU = Effort(rows=(2,), replays=1, times=0)
# What a trial needs beside the weights: recorded arguments, copies of one call's, products in fp32 piece by piece.
WORKSPACE = 3 << 30

# For a CPU, where Triton's interpreter takes milliseconds a program.
SMALL = DecoderSpec("llama", 2, 64, 4, 2, 16, 96, 128, 512, None, 1e-5, 1.0, False)


def trial(
    subject: Subject, device: torch.device, forms: list[FormResult], engines: list[EngineResult], tell: Teller
) -> str | None:
    """Add to ``forms`` and ``engines`` what they do not hold yet; returns why nothing could be tried, or None."""
    tell.begin("facts")
    why = available(device)["triton"] or _short_of_memory(subject, device)
    if why is not None:
        return why
    on_gpu = device.type == "cuda"
    tell("facts", timed=on_gpu, device=torch.cuda.get_device_name(device) if on_gpu else "cpu")
    effort, dtype = GPU if on_gpu else CPU, getattr(torch, subject.dtype)
    known = {(result.op, result.form) for result in forms}
    with torch.inference_mode():
        tell.begin("recording")
        cases, kept = record(subject, device, dtype, effort)
        forms += try_forms(cases, kept, device, effort, known, tell)
        forms += try_prefill(cases, kept, device, effort, known, tell)
        del cases
        if on_gpu:
            torch.cuda.empty_cache()
        chosen, _ = choose_forms(forms)
        if chosen:
            ops = assemble(chosen, choose_prefill(forms))
            done = {engine.graphs for engine in engines}
            engines += try_engine(subject, ops, device, dtype, done, on_gpu, tell)
    return None


def _short_of_memory(subject: Subject, device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    need = weight_bytes(decoder_spec(subject.spec), getattr(torch, subject.dtype)) + WORKSPACE
    if free >= need:
        return None
    return f"{free / 2**30:.1f} GiB of the device are free, and a trial of this model takes {need / 2**30:.1f} GiB"


def why_cannot(error: BaseException) -> str | None:
    """What an error of CUDA says of the circumstances, as one sentence; None where it says something of a kernel."""
    said = str(error).lower()
    if out_of_memory(error):
        return "the device ran out of memory during the trial: free some, or use a smaller model"
    if "busy or unavailable" in said:
        return "the device is in exclusive mode or busy: another process (perhaps this one) has it"
    if "driver" in said and ("too old" in said or "insufficient" in said):
        return f"the driver is too old for this torch: {said_of(error)}"
    if "no nvidia driver" in said or "not compiled with cuda" in said or "no cuda gpus" in said:
        return said_of(error)
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m icon2_rt.trial", description=__doc__)
    parser.add_argument("--request", default="{}", help="JSON: subject, device, and what is known already")
    parser.add_argument("--pipe", type=int, help="a file descriptor for events, a JSON object a line")
    parser.add_argument("--device", help="cuda, cuda:1, or cpu under TRITON_INTERPRET=1")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    given = parser.parse_args(arguments)
    asked: dict[str, Any] = json.loads(given.request)
    device = torch.device(given.device or asked.get("device", "cuda"))
    on_gpu = device.type == "cuda"
    usual = Subject(LLAMA_3_8B, "bfloat16") if on_gpu else Subject(SMALL, "float32", page_size=16, split_pages=2)
    subject = Subject.from_dict(asked["subject"]) if "subject" in asked else usual
    forms = [FormResult(**f) for f in asked.get("forms", [])]
    engines = [EngineResult(**e) for e in asked.get("engines", [])]
    if given.pipe is not None:
        _die_with_parent()
    _exact_products()
    tell = Teller(given.pipe, asked.get("marker"), asked.get("machine", ""))
    try:
        # Kernels are launched on the current device, whichever the tensors are on.
        with torch.cuda.device(device) if on_gpu else nullcontext():
            why = trial(subject, device, forms, engines, tell)
    except (RuntimeError, AssertionError) as error:
        why = why_cannot(error)
        if why is None:
            raise
    if why is not None:
        tell("cannot", why=why)
    tell("done")
    if given.json:
        verdict = Qualification("not tried", why) if why is not None else conclude(forms, engines, on_gpu)
        print(json.dumps(verdict.to_dict(), indent=1))
    return 0


def _die_with_parent() -> None:
    """A trial whose parent was killed would have the device to itself for minutes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _exact_products() -> None:
    """fp32 means fp32, since all is held against it. Some images let matrix products use TF32 by their environment
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1), which is 1e-3 off and would make right kernels look wrong."""
    torch.set_float32_matmul_precision("highest")
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        del os.environ["NVIDIA_TF32_OVERRIDE"]  # cuBLAS reads it when it is first used


if __name__ == "__main__":
    sys.exit(main())
