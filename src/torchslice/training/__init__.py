"""Training: settings, one visible loop, objectives, checkpoints that resume bit-equal; and what a network is worth."""

from .costs import Cost, Latency, cost, latency, latency_ms
from .evaluate import Accuracy, accuracy, accuracy_of, predict
from .finetune import finetune
from .fit import fit
from .objectives import CrossEntropy, Objective
from .outcome import Outcome
from .settings import Training

__all__ = [
    "Accuracy",
    "Cost",
    "CrossEntropy",
    "Latency",
    "Objective",
    "Outcome",
    "Training",
    "accuracy",
    "accuracy_of",
    "cost",
    "finetune",
    "fit",
    "latency",
    "latency_ms",
    "predict",
]
