"""What a CUDA device has proven, and so what ``backend="auto"`` uses on it.

The kernels have to be right and fast on the device, driver and versions at hand, and only there can that be seen. The
first time that a model of some sizes meets a device, :mod:`icon2_rt.trial` tries every kernel in a process of its own;
this package starts it, bounds it, and keeps its verdict.
"""

from icon2_rt.qualify.cache import LLAMA_3_8B, Entry, Subject, folder, proven_here
from icon2_rt.qualify.child import Limits
from icon2_rt.qualify.facts import DeviceFacts
from icon2_rt.qualify.gate import Choice, choose, qualify, stored
from icon2_rt.qualify.verdict import EngineResult, FormResult, Qualification

__all__ = [
    "LLAMA_3_8B",
    "Choice",
    "DeviceFacts",
    "EngineResult",
    "Entry",
    "FormResult",
    "Limits",
    "Qualification",
    "Subject",
    "choose",
    "folder",
    "proven_here",
    "qualify",
    "stored",
]
