"""What a decode step has to move, to compute and to wait for, and so what it is predicted to take: the figure that
every measured step stands beside. Nothing here has been measured on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from bench.shapes import SHAPES, step_weights
from icon2_rt.models import DecoderSpec

# Kernels of a block: two add-steer-norms, qkv, rope, attention and its merge, o, gate and up, silu-mul, down.
LAUNCHES_PER_BLOCK, PRODUCTS_PER_BLOCK = 10, 4
# Around them: begin_step, the embedding's rows, the final norm, the head, and four of sampling.
LAUNCHES_AROUND, PRODUCTS_AROUND = 8, 1
# From the end of one kernel of a graph to the start of the next: all that a launch costs where nothing waits for data.
GAP_SECONDS = 1.3e-6
# A small kernel that reads what the one before it wrote: the gap, its own start and end, and at least one round trip to
# memory. 2.5 to 3 µs, however little it does; every small kernel of a step is one of these.
SMALL_SECONDS = 2.75e-6
# What a row waits for at a steered block: two more round trips to memory; each further term one to L2.
STEERED_SECONDS, TERM_SECONDS = 1.0e-6, 0.3e-6
# What a matrix library reaches of the copy's bandwidth at a few rows, where the weights are all that counts.
PRODUCT_SHARE, WORST_SHARE, BEST_SHARE = 0.87, 0.82, 0.92

# Between steps. The results' copies and the event behind them leave the device idle for 5 to 10 µs a step.
RESULTS_SECONDS = 7.5e-6
# The host's part of a prefill pass (6 to 8 ms of Python), during which no step is launched; some ten small copies to
# seat the rows that join; what a pass reaches of a large product's speed, attention and small kernels included.
PASS_HOST_SECONDS, JOIN_SECONDS, PASS_SHARE = 7e-3, 0.1e-3, 0.75
PASS_TOKENS = 2048  # the default of prefill_chunk
NEW_TOKENS = 256  # of a branch, in the table of runs


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

    @property
    def launch_seconds(self) -> float:
        """What the launches take beside the bytes: a gap before each product, a small kernel's floor for the others."""
        products = self.spec.n_layers * PRODUCTS_PER_BLOCK + PRODUCTS_AROUND
        return products * GAP_SECONDS + (self.launches - products) * SMALL_SECONDS

    def milliseconds(self, machine: Machine, share: float = PRODUCT_SHARE) -> float:
        """Products at the larger of their two times (``share``: of the copy's bandwidth), everything else at the copy's
        speed, the launches, and what steered blocks wait for."""
        products = max(self.weights / (share * machine.copy), self.flops / machine.flops)
        rest = (self.bytes - self.weights) / machine.copy
        waits = self.spec.n_layers * (STEERED_SECONDS + (self.terms - 1) * TERM_SECONDS) if self.terms else 0.0
        return 1e3 * (products + rest + self.launch_seconds + waits)


@dataclass(frozen=True)
class Admission:
    """What is done for ``groups`` new groups of ``load`` that take the seats of finished ones together."""

    load: Load
    groups: int

    def pass_milliseconds(self, machine: Machine) -> float:
        """Prefill, as long as the host's or the device's part takes, and seating their rows: no step runs then."""
        tokens = self.groups * self.load.prompt
        passes = math.ceil(tokens / PASS_TOKENS)
        read = passes * self.load.weights / (PRODUCT_SHARE * machine.copy)
        computed = 2 * tokens * step_weights(self.load.spec) / (PASS_SHARE * machine.flops)
        return 1e3 * (max(passes * PASS_HOST_SECONDS, read, computed) + JOIN_SECONDS)

    def share(self, machine: Machine, new_tokens: int) -> float:
        """Of a long run's time, where each branch generates ``new_tokens`` and all of ``load`` is seated: a group ends
        every new_tokens / load.groups steps."""
        steps = new_tokens * self.groups / self.load.groups
        decoding = steps * (self.load.milliseconds(machine) + 1e3 * RESULTS_SECONDS)
        prefill = self.pass_milliseconds(machine)
        return prefill / (decoding + prefill)


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
            f"{1e3 * load.launch_seconds:.2f} ms |"
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


def runs_table() -> str:
    """Predicted share of prefill and joining in a run of Llama-3-8B pairs, by how many pairs are admitted at once."""
    lines = [
        "| GPU | prompt | pairs seated | a pass a freed pair | of the time | a pass for an eighth | of the time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for machine in (H100, H200):
        for prompt in (64, 256, 2048):
            for seated in (32, 128):
                load = Load(SHAPES["llama3-8b"], seated, 2, prompt, generated=NEW_TOKENS // 2, terms=1)
                if load.weights + load.kv > machine.memory:
                    continue
                cells = []
                for groups in (1, seated // 8):
                    admission = Admission(load, groups)
                    cells += [
                        f"{admission.pass_milliseconds(machine) / groups:.1f} ms a pair",
                        f"{100 * admission.share(machine, NEW_TOKENS):.0f} %",
                    ]
                lines.append(f"| {machine.name} | {prompt} | {seated} | {' | '.join(cells)} |")
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
