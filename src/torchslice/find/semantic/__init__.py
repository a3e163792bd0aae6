"""Semantic slicing (NeuSemSlice, arXiv 2407.20281): which neurons of a trained model matter to which classes."""

from .allocation import allocate
from .contributions import Contributions, contributions
from .grams import Similarity, similarity
from .groups import Group, Groups, groups
from .metrics import METRICS, Metric
from .strategies import ByGroup, PerClass, PerLayer, ReachTheta, SemanticSlices, Strategy, class_slices

__all__ = [
    "METRICS",
    "ByGroup",
    "Contributions",
    "Group",
    "Groups",
    "Metric",
    "PerClass",
    "PerLayer",
    "ReachTheta",
    "SemanticSlices",
    "Similarity",
    "Strategy",
    "allocate",
    "class_slices",
    "contributions",
    "groups",
    "similarity",
]
