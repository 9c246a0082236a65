"""What a CUDA device is, asked of the driver without creating a context on it.

The trial runs in another process and needs the device for itself: in exclusive mode a context in this one would refuse
it. So nothing here goes through :mod:`torch.cuda`.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from icon2_rt.ops import OLDEST_CUDA

ComputeMode = Literal["default", "exclusive", "prohibited"]
# CUdevice_attribute
_COMPUTE_MODE, _MAJOR, _MINOR = 20, 75, 76
_MODES: dict[int, ComputeMode] = {1: "exclusive", 2: "prohibited", 3: "exclusive"}


@dataclass(frozen=True)
class DeviceFacts:
    """A CUDA device and what stands between it and this process.

    Attributes:
        index: its number among the visible devices. memory: bytes in all. driver: the kernel driver's version.
        driver_cuda: the newest CUDA that the driver knows. torch_cuda: what torch was built for. hip: ROCm's version,
            None on CUDA. mps: several processes share the device through the multi-process service. uuid: which of all
            devices it is, in hexadecimal.
    """

    name: str
    index: int = 0
    capability: tuple[int, int] = (0, 0)
    memory: int = 0
    driver: str = ""
    driver_cuda: tuple[int, int] | None = None
    torch_cuda: str | None = None
    hip: str | None = None
    compute_mode: ComputeMode = "default"
    mps: bool = False
    uuid: str = ""

    def obstacle(self) -> str | None:
        """Why no kernel can run on it, as one sentence; None where one can."""
        if self.hip is not None:
            return f"this torch is built for ROCm {self.hip}, and the kernels are for CUDA"
        if self.driver_cuda is not None and self.torch_cuda is not None:
            major = int(self.torch_cuda.split(".")[0])
            if self.driver_cuda[0] < major:
                return (
                    f"the driver {self.driver} knows CUDA {self.driver_cuda[0]}.{self.driver_cuda[1]} and this torch "
                    f"needs {self.torch_cuda}: install a newer driver, or a torch built for CUDA {self.driver_cuda[0]}"
                )
        if self.capability < OLDEST_CUDA:
            oldest, here = (".".join(map(str, c)) for c in (OLDEST_CUDA, self.capability))
            return f"the kernels need compute capability {oldest} or newer, and {self.name} has {here}"
        if self.compute_mode == "prohibited":
            return f"{self.name} is in compute mode 'prohibited': sudo nvidia-smi -c DEFAULT"
        return None

    def not_now(self, asked: bool) -> str | None:
        """Why no trial can begin on it now, although kernels may run there; ``asked``: somebody asked for the trial."""
        if self.compute_mode == "exclusive" and torch.cuda.is_initialized():
            return (
                f"{self.name} is in exclusive mode and this process uses it already, so that no trial can: make the "
                f"Runtime before anything is moved to the device, or run `icon2 doctor --qualify` once"
            )
        if self.mps and not asked:
            return (
                f"{self.name} is shared through MPS, where a fault in a trial would end other processes too; "
                f"`icon2 doctor --qualify` tries it all the same"
            )
        return None


def read(device: torch.device) -> DeviceFacts:
    """The facts of a CUDA device (of the current one where ``device`` has no number)."""
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    return by_driver(index) or _by_torch(index)


def by_driver(index: int) -> DeviceFacts | None:
    """The facts of the device of that number as the driver says them; None without a driver, or such a device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number, handle, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name, uuid = ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(handle), index):
        return None
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceGetUuid(uuid, handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), handle)

    def attribute(which: int) -> int:
        cuda.cuDeviceGetAttribute(ctypes.byref(number), which, handle)
        return number.value

    capability = (attribute(_MAJOR), attribute(_MINOR))
    mode = _MODES.get(attribute(_COMPUTE_MODE), "default")
    cuda.cuDriverGetVersion(ctypes.byref(number))
    return DeviceFacts(
        name=name.value.decode(errors="replace"),
        index=index,
        capability=capability,
        memory=size.value,
        driver=_driver_version(),
        driver_cuda=(number.value // 1000, number.value % 1000 // 10),
        compute_mode=mode,
        torch_cuda=torch.version.cuda,
        hip=torch.version.hip,
        mps=_under_mps(),
        uuid=uuid.raw.hex(),
    )


def _by_torch(index: int) -> DeviceFacts:
    """Where the driver cannot be asked directly (ROCm, another platform)."""
    found = torch.cuda.get_device_properties(index)
    return DeviceFacts(
        found.name, index, (found.major, found.minor), found.total_memory, driver=_driver_version(),
        torch_cuda=torch.version.cuda, hip=torch.version.hip, mps=_under_mps(),
    )  # fmt: skip


def _driver_version() -> str:
    """As in ``580.65.06``, the first number in what the kernel module says of itself; "" where it says nothing."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "")


def _under_mps() -> bool:
    pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return (Path(pipes) / "control").exists()
