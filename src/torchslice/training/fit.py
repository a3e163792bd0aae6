"""Train a network in place, with checkpoints from which the same call resumes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Task, check_task
from ..errors import TorchsliceError, first_line
from ..files import locked
from ..graph.record import check_model, evaluating
from ..graph.views import view_of
from ..inputs import Output, batch_size, describe, device_of, run, to_device
from .batches import Batches
from .checkpoint import Checkpoint
from .evaluate import accuracy
from .loop import train_epochs
from .objectives import CrossEntropy, Drawn, Objective, describe_objective
from .outcome import Row
from .placement import choose_placement
from .progress import progress_bar
from .ranks import current_ranks
from .settings import Training

KEEP = ("last", "best")
Look = Callable[[nn.Module], dict[str, Any]]


def fit(
    model: nn.Module,
    task: Task,
    training: Training | None = None,
    *,
    objective: Objective | Drawn | None = None,
    output: Output = None,
    folder: str | Path | None = None,
    keep: str = "last",
    look: Look | None = None,
) -> list[Row]:
    """Train a model in place and return one row of figures per epoch.

    The model ends on the device it was trained on, in eval mode. With a folder, the state after every epoch is kept
    there, and the same call resumes after the last finished epoch, bit-equal to a run that was never interrupted; a
    call with more epochs goes on from the last state of a finished run, with a new learning rate schedule. Two calls
    never train in one folder: the second is an error. Under torchrun every process trains on its part of the same
    batches. The test split is never looked at.

    Args:
        model: any network with logits [B, C] as output, not wrapped or compiled.
        training: settings.
        objective: what to minimise, see `Objective`, or what draws it for every step, with the classes of its batch,
            see `Drawn`; by default the cross entropy with `training.label_smoothing`.
        output: picks the logits from what the model returns, see `find_neurons`.
        folder: gets checkpoint.safetensors and metrics.jsonl.
        keep: "last", or "best": the epoch with the best validation accuracy, the latest among equal ones. Then epoch 0,
            the model as given, is looked at too and has the first row.
        look: gives the figures on validation samples for a row; epochs are chosen by its "validation_accuracy".

    Returns:
        Rows with epoch, learning_rate (at its start), loss and its parts, train_accuracy, steps, seconds (of training
        alone), validation_accuracy.

    >>> import copy
    >>> rows = fit(copy.deepcopy(model), task, quick, folder=folder)
    >>> [row["epoch"] for row in rows]
    [1]
    """
    check_model(model)
    check_task(task)
    training = Training() if training is None else training
    if not isinstance(training, Training):
        raise TorchsliceError(f"training must be a Training, such as Training(epochs=3); got {training!r}.")
    if not (objective is None or callable(objective) or hasattr(objective, "draw")):
        raise TorchsliceError(f"objective must be a function of model, inputs and labels; got {objective!r}.")
    if keep not in KEEP:
        raise TorchsliceError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}.")
    placement = choose_placement(training.device, training.precision)
    training = replace(training, precision=placement.precision)
    ranks = current_ranks(placement.device)
    batches = Batches(
        task,
        batch_size=training.batch_size,
        seed=training.seed,
        device=placement.device,
        draw=getattr(objective, "draw", None),
        ranks=ranks,
    )
    _check_task(model, task, output)
    memory_format = placement.put(model, task.example)
    optimizer = training.make_optimizer(model)
    target = objective or CrossEntropy(training.label_smoothing, output)

    def judge() -> dict[str, Any]:
        if look is not None:
            figures = look(model)
            if keep == "best" and "validation_accuracy" not in figures:
                raise TorchsliceError(f'look must give "validation_accuracy" to choose by; it gave {list(figures)}.')
            return figures
        return {"validation_accuracy": accuracy(model, task, "validation", output=output).overall}

    history: list[Row] = []
    best, checkpoint, first_epoch = None, None, 0
    if folder is not None:
        about = {"task": f"{task!r} {task.fingerprint}", "objective": describe_objective(target), "keep": keep}
        settings = {**training.to_plain(), "processes": ranks.count, **about}
        checkpoint = Checkpoint(folder, settings)
    with locked(folder) if folder is not None and ranks.first else contextlib.nullcontext():
        if checkpoint:
            history, first_epoch, best = checkpoint.restore(model, optimizer)
        done = history[-1]["epoch"] if history else 0
        if len(ranks.gathered(torch.tensor([done], device=placement.device), ranks.count).unique()) > 1:
            raise TorchsliceError(
                f"the processes find different states in {folder}; name a folder that all machines see."
            )
        if keep == "best" and not history:
            history, best = [{"epoch": 0, "steps": 0, "seconds": 0.0, **judge()}], copy.deepcopy(model.state_dict())
            if checkpoint and ranks.first:
                checkpoint.save_best(model)
        ranks.copy_from_first(model.state_dict().values())
        steps = len(batches)
        cuda = [placement.device] if placement.device.type == "cuda" else []
        try:
            shown = progress_bar(training.progress, total=training.epochs * steps, done=done * steps)
            with shown as bar, torch.random.fork_rng(cuda):
                for row in train_epochs(
                    model,
                    batches,
                    target,
                    optimizer,
                    training,
                    placement=placement,
                    memory_format=memory_format,
                    done=done,
                    rate=lambda step: training.rate(step, steps, first_epoch=first_epoch),
                    bar=bar,
                ):
                    ranks.copy_from_first(model.buffers())
                    history.append({**row, **judge()})
                    if keep == "best" and history[-1]["validation_accuracy"] >= max(_validation(history)):
                        best = copy.deepcopy(model.state_dict())
                        if checkpoint and ranks.first:
                            checkpoint.save_best(model)
                    if checkpoint and ranks.first:
                        checkpoint.save(model, optimizer, history, first_epoch)
        except KeyboardInterrupt as interrupt:
            done = history[-1]["epoch"] if history else 0
            kept = f"the first {done} of {training.epochs} epochs are in {folder}; the same call resumes after them"
            kept = kept if checkpoint else "nothing of it was kept, as it has no folder"
            interrupt.add_note(f"Training was interrupted; {kept}.")
            raise
        finally:
            model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if best is not None:
            model.load_state_dict(best)
    return history


def _validation(history: Sequence[Row]) -> list[float]:
    return [row["validation_accuracy"] for row in history]


def best_epoch(history: Sequence[Row]) -> int:
    """Return the index of the row with the best validation accuracy, the latest among equal ones."""
    found = _validation(history)
    return max(range(len(found)), key=lambda index: (found[index], index))


def _check_task(model: nn.Module, task: Task, output: Output) -> None:
    """Raise unless the model answers samples of the task with a logit for each of its classes."""
    example, view = task.example, view_of(model)
    try:
        with evaluating(view):
            logits = run(view, to_device(example, device_of(model)), output)
    except TorchsliceError:
        raise
    except Exception as error:
        raise TorchsliceError(
            f"the model cannot take the inputs of {task.name} ({describe(example)}): {first_line(error)}."
        ) from error
    size = batch_size(example)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (size, len(task.classes)):
        raise TorchsliceError(
            f"the model's output for {size} samples of {task.name} is {describe(logits)}; "
            f"needed are logits [{size}, {len(task.classes)}], one for each class."
        )
