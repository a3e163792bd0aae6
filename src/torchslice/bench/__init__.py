"""Experiments that reproduce published tables, each at three scales: smoke (a test), cpu (two cores), paper (a GPU)."""

from . import extend, mwt, readapt, restructure, reuse, slicing, speed
from .experiment import BENCHES, SCALES

__all__ = ["BENCHES", "SCALES", "extend", "mwt", "readapt", "restructure", "reuse", "slicing", "speed"]
