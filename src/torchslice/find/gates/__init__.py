"""Modularizing while training (arXiv 2306.09376): gates, their losses, class slices, and how modular a model is."""

from .gated import GatedModel, attach
from .losses import objective
from .measures import report
from .slicing import class_slices, slices_from, statistics

__all__ = ["GatedModel", "attach", "class_slices", "objective", "report", "slices_from", "statistics"]
