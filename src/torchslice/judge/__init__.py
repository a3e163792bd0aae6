"""Say honestly what a network is worth: accuracy, cost, calibration, and what it is compared with."""

from ..training import Accuracy, Cost, Latency, accuracy, accuracy_of, cost, latency, latency_ms, predict
from .baselines import random_like, reinitialised
from .calibrate import best_temperature, calibrate, calibration_error
from .compensate import compensate
from .forgetting import Traces, forgetting
from .outside import SCORES, auroc, false_positive_rate, features, nearest, threshold
from .recalibrate import recalibrate
from .repair import Repaired, repair
from .stages import STAGES, Stage, Stages, evaluate_stages

__all__ = [
    "SCORES",
    "STAGES",
    "Accuracy",
    "Cost",
    "Latency",
    "Repaired",
    "Stage",
    "Stages",
    "Traces",
    "accuracy",
    "accuracy_of",
    "auroc",
    "best_temperature",
    "calibrate",
    "calibration_error",
    "compensate",
    "cost",
    "evaluate_stages",
    "false_positive_rate",
    "features",
    "forgetting",
    "latency",
    "latency_ms",
    "nearest",
    "predict",
    "random_like",
    "recalibrate",
    "reinitialised",
    "repair",
    "threshold",
]
