"""What a kernel may cost. Its budget stands beside it, and tests/compile holds the compiled code to it, so that a
regression shows on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Budget:
    """The most that a kernel may use, on every architecture and at every size of the compile lane.

    Attributes:
        registers: per thread. registers_on: where an architecture (86: compute capability 8.6) may have another number.
        shared: bytes of shared memory per program.
        narrow_loads: instructions that load less than 16 bytes from global memory: what a program needs beside its
            tiles (indices, coefficients). A tile that is no longer read 16 bytes at a time shows here.
        stack: bytes of local memory per thread; a spilled register is in it. More than 0 only for a function of
            libdevice that needs an array.
    """

    registers: int
    shared: int
    narrow_loads: int
    stack: int = 0
    registers_on: Mapping[int, int] = field(default_factory=dict)

    def on(self, arch: int) -> dict[str, int]:
        """The most of each on ``arch``, by name."""
        registers = self.registers_on.get(arch, self.registers)
        return {
            "registers": registers,
            "stack": self.stack,
            "shared": self.shared,
            "narrow_loads": self.narrow_loads,
        }
