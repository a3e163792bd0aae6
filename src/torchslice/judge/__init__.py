"""Say honestly what a network is worth: accuracy, cost, calibration, and what it is compared with."""

from ..training import Accuracy, Cost, Latency, accuracy, accuracy_of, confusion, cost, latency, latency_ms, predict
from .baselines import random_like, reinitialised
from .calibrate import best_temperature, calibrate, calibration_error
from .recalibrate import recalibrate, try_recalibration
from .stages import STAGES, Stage, Stages, evaluate_stages

__all__ = [
    "STAGES",
    "Accuracy",
    "Cost",
    "Latency",
    "Stage",
    "Stages",
    "accuracy",
    "accuracy_of",
    "best_temperature",
    "calibrate",
    "calibration_error",
    "confusion",
    "cost",
    "evaluate_stages",
    "latency",
    "latency_ms",
    "predict",
    "random_like",
    "recalibrate",
    "reinitialised",
    "try_recalibration",
]
