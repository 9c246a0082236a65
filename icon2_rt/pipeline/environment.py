"""What the bytes of a run depend on besides its config: versions, machine, and how the runtime was set up."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

from icon2_rt.engine.kv import page_bytes

if TYPE_CHECKING:
    from icon2_rt import Runtime

# What decodes, tokenises and writes; another version of any of these may give other bytes.
DECIDING = ("icon2_rt", "torch", "triton", "transformers", "tokenizers", "numpy", "pyarrow")


def machine(rt: Runtime) -> dict[str, Any]:
    """The device, and how the runtime uses it: another number of threads or KV pages is another schedule."""
    device = torch.device(rt.device)
    hardware: dict[str, Any]
    if device.type == "cuda":
        hardware = {"device": torch.cuda.get_device_name(device)}
        if rt.qualification is not None:  # which forms of the ops were proven, and so used: they decide bytes
            hardware["ops"] = rt.qualification.chosen
    else:
        hardware = {
            "device": device.type,
            "architecture": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    return {
        **hardware,
        "backend": str(rt.backend),
        "dtype": str(rt.dtype).removeprefix("torch."),
        "kv_pages": rt.kv_pages,
        "kv_bytes": rt.kv_pages * page_bytes(rt.spec, rt.page_size, rt.dtype),
        "page_size": rt.page_size,
    }
