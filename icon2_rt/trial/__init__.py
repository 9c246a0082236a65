"""The trial of a device: every kernel at a model's own sizes, then a whole engine, in a process of its own.

``python -m icon2_rt.trial`` is started by :mod:`icon2_rt.qualify`, which bounds it and keeps its verdict. No runtime
imports anything of it.
"""
