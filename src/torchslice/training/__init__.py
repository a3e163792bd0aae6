"""Training: one visible loop, objectives, batches on the device, and checkpoints that resume bit-equal."""

from .fit import accuracy, fit
from .objectives import Objective, cross_entropy
from .placement import Placement, choose_placement

__all__ = ["Objective", "Placement", "accuracy", "choose_placement", "cross_entropy", "fit"]
