"""icon2_rt: steered decoding of several branches over one prompt KV, and Icon² on top of it."""

from icon2_rt.outputs import BranchedOutput, Completion, Fired, LastRun, PairedOutput, Paths, Scored
from icon2_rt.runtime import GenerateOptions, Prefix, Runtime
from icon2_rt.steering import Direction, DirectionSet, Steering, Term

__version__ = "0.1.0"

__all__ = [
    "BranchedOutput",
    "Completion",
    "Direction",
    "DirectionSet",
    "Fired",
    "GenerateOptions",
    "LastRun",
    "PairedOutput",
    "Paths",
    "Prefix",
    "Runtime",
    "Scored",
    "Steering",
    "Term",
    "__version__",
]
