"""Modularizing while training (arXiv 2306.09376): gates, their losses, class slices, and how modular a model is."""

from .class_slices import GateStatistics, class_slices, gate_statistics, mean_gate_values, slices_from
from .gates import Gate, GatedModel, attach_gates
from .health import Health, health_of
from .losses import cohesion_loss, coupling_loss
from .metrics import Report, cohesion, coupling, report
from .objective import objective
from .subtasks import SubTasks

__all__ = [
    "Gate",
    "GateStatistics",
    "GatedModel",
    "Health",
    "Report",
    "SubTasks",
    "attach_gates",
    "class_slices",
    "cohesion",
    "cohesion_loss",
    "coupling",
    "coupling_loss",
    "gate_statistics",
    "health_of",
    "mean_gate_values",
    "objective",
    "report",
    "slices_from",
]
