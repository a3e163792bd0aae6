"""Train a copy of a network a little longer and keep its best epoch, by the validation samples alone."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..data import Task
from ..graph.record import check_model
from ..graph.views import copy_of
from ..inputs import Output, device_of
from .fit import Look, best_epoch, fit
from .objectives import Objective
from .outcome import Outcome
from .settings import Training


def finetune(
    model: nn.Module,
    task: Task,
    training: Training | None = None,
    *,
    objective: Objective | None = None,
    output: Output = None,
    folder: str | Path | None = None,
    look: Look | None = None,
) -> Outcome:
    """Train a copy of a model as `fit` does, and return it as it was after the epoch with the best validation accuracy.

    Among equal epochs the latest is kept; epoch 0, the model as given, takes part. The test split is never looked at.
    The result is in eval mode, on the device of the given model. The arguments are those of `fit`; the default settings
    have a learning rate of 0.01.

    >>> tuned = finetune(small, task.restrict(["3", "8"]), quick)
    >>> len(tuned.log), sorted(tuned.best)[0]
    (2, 'epoch')
    """
    check_model(model)
    home, tuned = device_of(model), copy_of(model, {})
    rows = fit(
        tuned,
        task,
        training or Training(learning_rate=0.01),
        objective=objective,
        output=output,
        folder=folder,
        keep="best",
        look=look,
    )
    return Outcome(tuned.to(home), tuple(rows), best_epoch(rows))
