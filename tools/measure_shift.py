"""How much of a small additive steering arrives: the shift of ⟨h, u⟩ per unit of γ, by residual dtype and rounding.

One block's worth of arithmetic on random states of a large model's size: a residual that has the dtype already, a block
output beside it, and a unit direction. The shift is the difference of ⟨h, u⟩ with and without the steering, after
rounding; 100 % is what the law says. *One rounding* is the runtime's op, *hook* adds γu to the block's rounded output,
as a forward hook on a transformers model does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icon2_rt import Direction
from icon2_rt.engine.bank import DirectionBank
from icon2_rt.ops import add_steer_rmsnorm
from icon2_rt.steering import compile_steering

ROWS, HIDDEN = 512, 4096


def with_op(x: Tensor, residual: Tensor, u: Tensor, gamma: float) -> Tensor:
    """The runtime's op: residual + x + γu summed in fp32, rounded once."""
    compiled = compile_steering(gamma * Direction("u", u[None]), n_layers=1, hidden_size=HIDDEN)
    bank = DirectionBank(1, 1, 1, HIDDEN, torch.device("cpu"))
    bank.pin([compiled])
    steering = bank.row_steering([compiled] * len(residual))
    weight = torch.ones(HIDDEN, dtype=residual.dtype)
    return add_steer_rmsnorm(x, residual, weight, 1e-5, steering, 0)[0]


def with_hook(x: Tensor, residual: Tensor, u: Tensor, gamma: float) -> Tensor:
    """A forward hook: the block returns its rounded sum, and the hook adds γu in the model's dtype."""
    return (residual + x) + (gamma * u).to(residual.dtype)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(HIDDEN, generator=generator)
    u /= u.norm()
    print(f"hidden {HIDDEN}, {ROWS} states; mean shift of ⟨h, u⟩ / γ (standard deviation over states)")
    print(f"{'γ':>6} {'‖h‖':>5} {'dose':>6} {'fp32':>15} {'bf16, one rounding':>20} {'bf16, hook':>15}")
    for gamma, size in ((0.1, 4), (0.1, 16), (0.1, 64), (-0.05, 4), (-0.05, 16), (-0.05, 64)):
        state = torch.randn(ROWS, HIDDEN, generator=generator) * size / HIDDEN**0.5
        output = torch.randn(ROWS, HIDDEN, generator=generator) * 0.2 * size / HIDDEN**0.5
        line = f"{gamma:>6} {size:>5} {abs(gamma) / size:>6.2%}"
        for dtype, steer, width in (
            (torch.float32, with_op, 15),
            (torch.bfloat16, with_op, 20),
            (torch.bfloat16, with_hook, 15),
        ):
            residual, x = state.to(dtype), output.to(dtype)
            shift = (steer(x, residual, u, gamma).double() - (residual + x).double()) @ u.double() / gamma
            line += f" {f'{shift.mean():.1%} ({shift.std():.1%})':>{width}}"
        print(line)


if __name__ == "__main__":
    main()
