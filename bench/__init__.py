"""Measurements of the runtime. Nothing here asserts a speed; `python -m bench` says what there is."""
