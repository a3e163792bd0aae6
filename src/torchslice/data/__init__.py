"""Labelled images in memory: a data set is three splits, its class names and the statistics of its training images."""

from .sources import load, names
from .splits import Data, Split

__all__ = ["Data", "Split", "load", "names"]
