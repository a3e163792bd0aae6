"""Maintenance of trained networks: by training, keeping, replacing or removing the neurons of a slice."""

from .classes import classes_left, remove, update
from .compose import Composition, compose, replace
from .extend import check_extending, check_extension, extend, settle
from .partial import Computed, Partial
from .pruning import PRUNING
from .readapt import adapt, check_readapting, check_samples, readapt, top_by_score_per_parameter
from .restructure import check_restructuring, restructure
from .tasks import Extended

__all__ = [
    "PRUNING",
    "Composition",
    "Computed",
    "Extended",
    "Partial",
    "adapt",
    "check_extending",
    "check_extension",
    "check_readapting",
    "check_restructuring",
    "check_samples",
    "classes_left",
    "compose",
    "extend",
    "readapt",
    "remove",
    "replace",
    "restructure",
    "settle",
    "top_by_score_per_parameter",
    "update",
]
