"""Measurements of torchslice beside its baselines, each at three scales; run `python -m benchmarks` to list them."""
