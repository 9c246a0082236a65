"""What a decode step has to move and to compute, and so the time that no version can beat by much: the prediction that
every measured step stands beside."""

from __future__ import annotations

from dataclasses import dataclass

from bench.shapes import step_weights
from icon2_rt.models import DecoderSpec

# Kernels of a block: two add-steer-norms, qkv, rope, attention and its merge, o, gate and up, silu-mul, down.
LAUNCHES_PER_BLOCK = 10
# Around them: begin_step, the embedding's rows, the final norm, the head, and four of sampling.
LAUNCHES_AROUND = 8
# One launch inside a graph.
LAUNCH_SECONDS = 1.3e-6


@dataclass(frozen=True)
class Machine:
    """``copy``: bytes a second of a device copy, read plus written. ``flops``: of a large bf16 product, a second."""

    name: str
    copy: float
    flops: float


H100 = Machine("H100 80GB HBM3", 3.0e12, 790e12)
H200 = Machine("H200", 4.3e12, 790e12)


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
        """Products at the larger of their two times, everything else at the copy's speed, and the launches."""
        products = max(self.weights / machine.copy, self.flops / machine.flops)
        rest = (self.bytes - self.weights) / machine.copy
        return 1e3 * (products + rest + self.launches * LAUNCH_SECONDS)


def kv_bytes(spec: DecoderSpec, itemsize: int) -> int:
    """Of one position: K and V of all blocks."""
    return 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim * itemsize
