"""What to do with a slice: cut it out, tune the sub-model, say honestly what it is worth, save and load it."""

from .artefacts import load, read_record, save
from .controls import random_like, reinitialised
from .costs import Cost, Latency, cost, latency, latency_ms
from .evaluate import Accuracy, accuracy, accuracy_of, confusion, predict_logits, restrict_logits
from .extract import Retention, extract, retention
from .finetune import Tuned, finetune
from .recalibrate import recalibrate
from .stages import STAGES, Stage, Stages, evaluate_stages

__all__ = [
    "STAGES",
    "Accuracy",
    "Cost",
    "Latency",
    "Retention",
    "Stage",
    "Stages",
    "Tuned",
    "accuracy",
    "accuracy_of",
    "confusion",
    "cost",
    "evaluate_stages",
    "extract",
    "finetune",
    "latency",
    "latency_ms",
    "load",
    "predict_logits",
    "random_like",
    "read_record",
    "recalibrate",
    "reinitialised",
    "restrict_logits",
    "retention",
    "save",
]
