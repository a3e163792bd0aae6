"""Runs: how a network was trained, its weights and its slices, on disk; and whatever else commands can start from."""

from .recipe import METHODS, Recipe
from .run import Run
from .source import Opening, Source

__all__ = ["METHODS", "Opening", "Recipe", "Run", "Source"]
