"""Semantic slicing (arXiv 2407.20281): which neurons of a trained model matter to which classes."""

from .contributions import Contributions, contributions
from .grams import Similarity, prefix_similarity
from .metrics import METRICS, Metric
from .result import CRITERIA, SLICERS, Group, Rule, SemanticSlices
from .slicing import slice_model, slices_from

__all__ = [
    "CRITERIA",
    "METRICS",
    "SLICERS",
    "Contributions",
    "Group",
    "Metric",
    "Rule",
    "SemanticSlices",
    "Similarity",
    "contributions",
    "prefix_similarity",
    "slice_model",
    "slices_from",
]
