"""What to do with a slice: cut it out, tune the sub-model, say honestly what it is worth, save and load it."""

from .artefacts import load, read_record, save
from .calibrate import calibrate, calibration_error
from .controls import random_like, reinitialised
from .costs import Cost, Latency, cost, latency, latency_ms
from .evaluate import Accuracy, accuracy, accuracy_of, confusion, predict_logits, restrict_logits
from .extend import extend
from .extended import Extended
from .extract import Retention, extract, retention
from .finetune import Tuned, finetune
from .partial import Partial
from .pruning import PRUNING, worthiest
from .readapt import Readapted, adapt, readapt
from .recalibrate import recalibrate
from .restructure import restructure
from .restructured import Restructured
from .settle import settle
from .stages import STAGES, Stage, Stages, evaluate_stages
from .widen import Widened, widen

__all__ = [
    "PRUNING",
    "STAGES",
    "Accuracy",
    "Cost",
    "Extended",
    "Latency",
    "Partial",
    "Readapted",
    "Restructured",
    "Retention",
    "Stage",
    "Stages",
    "Tuned",
    "Widened",
    "accuracy",
    "accuracy_of",
    "adapt",
    "calibrate",
    "calibration_error",
    "confusion",
    "cost",
    "evaluate_stages",
    "extend",
    "extract",
    "finetune",
    "latency",
    "latency_ms",
    "load",
    "predict_logits",
    "random_like",
    "read_record",
    "readapt",
    "recalibrate",
    "reinitialised",
    "restrict_logits",
    "restructure",
    "retention",
    "save",
    "settle",
    "widen",
    "worthiest",
]
