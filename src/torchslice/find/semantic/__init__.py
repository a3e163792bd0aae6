"""Semantic slicing (NeuSemSlice, arXiv 2407.20281): which neurons of a trained model matter to which classes."""

from .contributions import Contributions, contributions
from .grams import Similarity, similarity
from .metrics import METRICS, Metric
from .result import STRATEGIES, Group, SemanticSlices
from .strategies import Budget, PerClass, PerLayer, ReachTheta, Strategy, class_slices

__all__ = [
    "METRICS",
    "STRATEGIES",
    "Budget",
    "Contributions",
    "Group",
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
