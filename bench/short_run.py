"""A few steps of everything on tiny decoders: what a memory checker can follow in a minute.

python -m bench.short_run [--ungraphed] [--native]
python -m bench.short_run --planted       an error on purpose, that a checker has to find
"""

from __future__ import annotations

import argparse

import torch
import triton
import triton.language as tl
from transformers import Qwen3Config, Qwen3ForCausalLM

from icon2_rt import Direction, Runtime
from icon2_rt.ops import Backend, available

N_LAYERS, HIDDEN, VOCAB = 3, 48, 131


@triton.jit
def planted_error(pointer, far):
    """Writes ``far`` elements beyond what it was given."""
    tl.store(pointer + far + tl.arange(0, 16), 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.short_run", description=__doc__.splitlines()[0])
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--ungraphed", action="store_true", help="without CUDA graphs")
    parser.add_argument("--native", action="store_true", help="linear and sample in CUDA C++, where they are built")
    options = parser.parse_args()
    if options.planted:
        buffer = torch.zeros(16, device="cuda")
        planted_error[(1,)](buffer, 1 << 30)
        torch.cuda.synchronize()
        return
    backend: Backend = "native" if options.native else "triton"
    why_not = available(torch.device("cuda"))[backend] if options.native else None
    if why_not is not None:
        print(f"short run: nothing to do, {why_not}")
        return
    for dtype in (torch.bfloat16, torch.float32):
        run("cuda", backend, dtype, graphs=not options.ungraphed)
    print("short run: done")


def dry() -> None:
    """The same with the reference ops on the CPU."""
    run("cpu", "reference", torch.float32, graphs=False)
    print("dry short run: done")


def run(device: str, backend: str, dtype: torch.dtype, graphs: bool) -> None:
    """Pairs and ladders, every scope, several terms, all filters, rows that join and leave, prompts of some splits."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=80, num_hidden_layers=N_LAYERS, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, dtype=dtype,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(dtype)
    rt = Runtime(
        model, device=device, backend=backend, kv_memory="4MiB", max_rows=6, page_size=16, split_pages=2,
        prefill_chunk=64, cuda_graphs=graphs,
    )  # fmt: skip
    a, b = (Direction(f"d{n}", torch.randn(N_LAYERS, HIDDEN)) for n in range(2))
    prompts = [[n % VOCAB for n in range(length)] for length in (1, 15, 16, 33, 70)]
    filters = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    branches = [None, (0.5 * a[1:] - 0.3 * b).with_keep_norm(), a.ablated(), (0.2 * b).with_scope("generated")]
    rt.generate_branches(prompts, branches, seed=0, max_new_tokens=4, min_new_tokens=2, eos_token_id=[1, 2], **filters)
    rt.generate_pairs(prompts, positive=(0.3 * a).with_scope("all"), negative=None, max_new_tokens=4, do_sample=False)
    rt.score(prompts[1:], [[1, 2, 3]] * 4, steering=0.1 * a)


if __name__ == "__main__":
    main()
