"""Maintenance of trained networks: restructure, readapt and extend, by training or keeping the neurons of a slice."""

from .extend import check_extending, check_extension, extend, settle
from .partial import Computed, Partial
from .pruning import PRUNING
from .readapt import adapt, check_readapting, check_samples, readapt, top_by_score_per_parameter
from .restructure import check_restructuring, restructure
from .tasks import Extended

__all__ = [
    "PRUNING",
    "Computed",
    "Extended",
    "Partial",
    "adapt",
    "check_extending",
    "check_extension",
    "check_readapting",
    "check_restructuring",
    "check_samples",
    "extend",
    "readapt",
    "restructure",
    "settle",
    "top_by_score_per_parameter",
]
