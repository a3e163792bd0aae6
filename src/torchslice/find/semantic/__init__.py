"""Semantic slicing (NeuSemSlice, arXiv 2407.20281): which neurons of a trained model matter to which classes."""

from .contributions import Contributions, contributions
from .grams import Similarity, similarity
from .metrics import METRICS, Metric
from .strategies import PerClass, PerLayer, ReachTheta, SemanticSlices, Strategy, class_slices

__all__ = [
    "METRICS",
    "Contributions",
    "Metric",
    "PerClass",
    "PerLayer",
    "ReachTheta",
    "SemanticSlices",
    "Similarity",
    "Strategy",
    "class_slices",
    "contributions",
    "similarity",
]
