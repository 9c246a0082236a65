"""What a decode step has to move and to compute, and so the time that no version can beat by much: the prediction that
every measured step stands beside."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.shapes import SHAPES, step_weights
from icon2_rt.models import DecoderSpec

# Kernels of a block: two add-steer-norms, qkv, rope, attention and its merge, o, gate and up, silu-mul, down.
LAUNCHES_PER_BLOCK = 10
# Around them: begin_step, the embedding's rows, the final norm, the head, and four of sampling.
LAUNCHES_AROUND = 8
# One launch inside a graph.
LAUNCH_SECONDS = 1.3e-6
# What a row waits for at a steered block: two more round trips to memory; each further term one to L2.
STEERED_SECONDS, TERM_SECONDS = 1.0e-6, 0.3e-6


@dataclass(frozen=True)
class Machine:
    """``copy``: bytes a second of a device copy, read plus written. ``flops``: of a large bf16 product, a second.
    ``memory``: bytes."""

    name: str
    copy: float
    flops: float
    memory: float = 80e9


H100 = Machine("H100 80GB", 3.0e12, 790e12)
H200 = Machine("H200", 4.3e12, 790e12, 140e9)


@dataclass(frozen=True)
class Load:
    """The rows of a step: ``groups`` of ``branches`` over prompts of ``prompt`` tokens, each ``generated`` tokens on.

    ``terms`` of steering act on every block; ``distinct`` steerings share them out. ``shared``: a group's branches read
    one copy of the prompt's KV; else each reads its own.
    """

    spec: DecoderSpec
    groups: int
    branches: int
    prompt: int
    generated: int = 64
    terms: int = 0
    distinct: int = 1
    shared: bool = True
    itemsize: int = 2

    @property
    def rows(self) -> int:
        return self.groups * self.branches

    @property
    def weights(self) -> int:
        return step_weights(self.spec) * self.itemsize

    @property
    def kv(self) -> int:
        """Bytes of K and V that are read."""
        copies = self.groups if self.shared else self.rows
        return (copies * self.prompt + self.rows * self.generated) * kv_bytes(self.spec, self.itemsize)

    @property
    def steering(self) -> int:
        """Bytes of unit vectors (fp32), each distinct one read once: the other rows find it in L2."""
        return self.terms * min(self.distinct, self.rows) * self.spec.n_layers * self.spec.hidden_size * 4

    @property
    def logits(self) -> int:
        """Written by the head, read twice by sampling."""
        return 3 * self.rows * self.spec.vocab_size * self.itemsize

    @property
    def bytes(self) -> int:
        return self.weights + self.kv + self.steering + self.logits

    @property
    def flops(self) -> int:
        """Of the matrix products; attention's are a few percent of them."""
        return 2 * self.rows * step_weights(self.spec)

    @property
    def launches(self) -> int:
        return self.spec.n_layers * LAUNCHES_PER_BLOCK + LAUNCHES_AROUND

    def milliseconds(self, machine: Machine) -> float:
        """Products at the larger of their two times, everything else at the copy's speed, the launches, and what
        steered blocks wait for."""
        products = max(self.weights / machine.copy, self.flops / machine.flops)
        rest = (self.bytes - self.weights) / machine.copy
        waits = self.spec.n_layers * (STEERED_SECONDS + (self.terms - 1) * TERM_SECONDS) if self.terms else 0.0
        return 1e3 * (products + rest + self.launches * LAUNCH_SECONDS + waits)


def kv_bytes(spec: DecoderSpec, itemsize: int) -> int:
    """Of one position: K and V of all blocks."""
    return 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim * itemsize


def sizes_table() -> str:
    """What one step of each decoder reads and launches, whatever the batch."""
    lines = [
        "| decoder | weights a step reads | KV of a token | launches | their time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ("llama3-8b", "qwen2-7b", "qwen2-1.5b"):
        load = Load(SHAPES[name], 1, 2, 256)
        kv = kv_bytes(load.spec, load.itemsize) / 1024
        lines.append(
            f"| {name} | {load.weights / 1e9:.2f} GB | {kv:.0f} KiB | {load.launches} | "
            f"{1e3 * load.launches * LAUNCH_SECONDS:.2f} ms |"
        )
    return "\n".join(lines) + "\n"


def steps_table() -> str:
    """Predicted milliseconds of a step of Llama-3-8B's steered pairs, unshared and shared."""
    pairs = (1, 8, 32, 128)
    lines = [f"| GPU | prompt | {' | '.join(f'{n} pair(s)' for n in pairs)} |", "| --- " * (len(pairs) + 2) + "|"]
    for machine in (H100, H200):
        for prompt in (256, 2048, 8192):
            cells = []
            for n in pairs:
                loads = [Load(SHAPES["llama3-8b"], n, 2, prompt, terms=1, shared=shared) for shared in (False, True)]
                shown = [
                    f"{load.milliseconds(machine):.2f}" if load.weights + load.kv < machine.memory else "–"
                    for load in loads
                ]
                cells.append(" / ".join(shown))
            lines.append(f"| {machine.name} | {prompt} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def targets_table() -> str:
    """Each target that the arithmetic reaches, beside what it gives on both GPUs."""
    big, small = SHAPES["llama3-8b"], SHAPES["qwen2-1.5b"]

    def excess(over: Load, under: Load) -> list[str]:
        return [f"{100 * (over.milliseconds(m) / under.milliseconds(m) - 1):+.1f} %" for m in (H100, H200)]

    def factor(over: Load, under: Load, times: int = 1) -> list[str]:
        return [f"{times * over.milliseconds(m) / under.milliseconds(m):.2f}×" for m in (H100, H200)]

    def pairs(spec: DecoderSpec, rows: int, terms: int, distinct: int = 1) -> Load:
        return Load(spec, rows // 2, 2, 256, terms=terms, distinct=distinct)

    one = Load(big, 1, 2, 2048, terms=1)
    share = [f"{100 * one.bytes / machine.copy / (one.milliseconds(machine) / 1e3):.0f} %" for machine in (H100, H200)]
    shared, single = Load(big, 32, 2, 2048, terms=1), Load(big, 1, 1, 2048, terms=1)
    far = replace(shared, prompt=8192)
    rows = [
        ("8B: all blocks steered over unsteered, 2 rows", "+1 %", *excess(pairs(big, 2, 1), pairs(big, 2, 0))),
        ("8B: the same, 256 rows", "+1 %", *excess(pairs(big, 256, 1), pairs(big, 256, 0))),
        ("1.5B: the same, 256 rows", "+2 %", *excess(pairs(small, 256, 1), pairs(small, 256, 0))),
        ("8B: 3 directions × all blocks, 256 rows", "+4 %", *excess(pairs(big, 256, 3), pairs(big, 256, 0))),
        ("1.5B: the same", "+4 %", *excess(pairs(small, 256, 3), pairs(small, 256, 0))),
        ("8B: 256 distinct steerings over 1, 256 rows", "+2 %", *excess(pairs(big, 256, 1, 256), pairs(big, 256, 1))),
        ("1.5B: the same", "+2 %", *excess(pairs(small, 256, 1, 256), pairs(small, 256, 1))),
        ("a pair over a single branch, 1 × 2048", "1.1×", *factor(one, single)),
        ("the same, 8 × 2048", "1.1×", *factor(replace(one, groups=8), replace(single, groups=8))),
        ("8 sequential branches over a ladder of 8", "6×", *factor(single, replace(single, branches=8), times=8)),
        ("unshared over shared, 32 × 2048", "1.25×", *factor(replace(shared, shared=False), shared)),
        ("unshared over shared, 32 × 8192", "1.55×", *factor(replace(far, shared=False), far)),
        ("one 8B pair, of the copy's bandwidth", "75 %, then 85 %", *share),
    ]
    lines = [
        "| target | bound | H100 | H200 |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
