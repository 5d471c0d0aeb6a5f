"""Whole models at the sizes that people use: how long a call and a video take, and how much memory.

`sizes` names the published models and videos, `arithmetic` counts their operations, `random_wan`
fills such a model with random weights, `variants` says which layers are linear and what computes
the rest, `subject` and `host` give calls of our own model and of ComfyUI's, `measuring` times
them, `lengths` over the number of tokens, `table` turns times into ratios, `runs` keeps what a
record has of other sizes. Nothing is timed before `agreement`. `training` measures training steps,
of a `random_subject`, within a `cap` of memory; `steps_table` says what they mean.
"""
