"""The training loop: one function, readable from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.record import check_model, evaluating
from ..data import Data, Split
from ..errors import TorchsliceError
from .batches import TrainingBatches, epoch_seed, in_order
from .checkpoint import Checkpoint
from .objectives import Objective, cross_entropy, describe
from .placement import Placement, choose_placement, fast_format
from .progress import RunningMeans, progress_bar
from .ranks import Ranks, current_ranks

SHOW_EVERY = 20  # steps between two looks at the losses, each of which waits for the device


def fit(
    model: nn.Module,
    data: Data,
    *,
    objective: Objective = cross_entropy,
    epochs: int,
    learning_rate: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    batch_size: int = 128,
    classes_per_batch: Sequence[int] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    folder: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train a model in place by SGD (Nesterov momentum, cosine schedule to zero) and return one row per epoch.

    The model ends on the device it was trained on, in eval mode. With a `folder`, the state after every epoch is kept
    there, and the same call resumes after the last finished epoch, bit-equal to a run that was never interrupted.
    Under torchrun every process trains on its part of the same batches. The test split is never looked at.

    Args:
        model: any network with logits [B, C] as output, not wrapped or compiled.
        objective: what to minimise, see `Objective`.
        epochs: passes over the training split, the interrupted ones included.
        learning_rate: of the first step.
        batch_size: images per step, over all processes.
        classes_per_batch: draws every batch from a few random classes; one of these numbers of classes, each
            equally likely. By default batches are drawn from all images.
        seed: of the order, the augmentation, and dropout; not of the weights, which the model already has.
        precision: "fp32", "bf16" (autocast, with float32 weights), or "auto": bf16 where the hardware computes in it.
        folder: gets checkpoint.safetensors and metrics.jsonl.

    Returns:
        Rows with epoch, learning_rate (at its start), loss and its parts, train_accuracy, validation_accuracy, seconds.

    >>> rows = fit(model, data, epochs=10, folder="runs/standard")
    >>> rows[-1]["validation_accuracy"]
    0.9371
    """
    check_model(model)
    placement = choose_placement(device, precision)
    ranks = current_ranks(placement.device)
    settings = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "classes_per_batch": None if classes_per_batch is None else list(classes_per_batch),
        "seed": seed,
        "precision": placement.precision,
    }
    _check_settings(**settings)
    batches = TrainingBatches(
        data,
        batch_size=batch_size,
        seed=seed,
        device=placement.device,
        classes_per_batch=classes_per_batch,
        ranks=ranks,
    )
    memory_format = placement.put(model, data.example)
    _check_output(model, data, placement)
    optimizer = torch.optim.SGD(
        trainable(model), lr=learning_rate, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
    )
    checkpoint = None
    history: list[dict[str, Any]] = []
    if folder is not None:
        used = {"data": f"{data!r} {data.fingerprint}", "objective": describe(objective), "processes": ranks.count}
        checkpoint = Checkpoint(folder, {**settings, **used})
        history = checkpoint.restore(model, optimizer)
    network = DistributedDataParallel(model) if ranks.count > 1 else model

    total, done = epochs * len(batches), len(history) * len(batches)
    cuda = [placement.device] if placement.device.type == "cuda" else []
    try:
        with progress_bar(progress and ranks.first, total=total, done=done) as bar, torch.random.fork_rng(cuda):
            for epoch in range(len(history) + 1, epochs + 1):
                started, means = time.perf_counter(), RunningMeans()
                torch.manual_seed(epoch_seed(seed, epoch, ranks.rank))  # dropout
                model.train()
                rate = cosine(learning_rate, done, total)
                for step, (images, labels) in enumerate(batches.epoch(epoch), start=1):
                    optimizer.param_groups[0]["lr"] = cosine(learning_rate, done, total)
                    images = images.clone(memory_format=memory_format)
                    with placement.autocast():
                        loss, right, parts = objective(network, images, labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    done += 1
                    means.add(len(right), loss=loss, **parts, train_accuracy=right.double().mean())
                    look = step % SHOW_EVERY == 0 or step == len(batches)
                    text = _losses(means, epoch, learning_rate) if look else ""
                    bar.advance(f"epoch {epoch}/{epochs}", text)
                ranks.copy_from_first(model.buffers())
                validation = accuracy(model, data, data.validation, placement=placement, ranks=ranks)
                row = {"epoch": epoch, "learning_rate": rate, **means.read(ranks), "validation_accuracy": validation}
                history.append({**row, "seconds": time.perf_counter() - started})
                if checkpoint and ranks.first:
                    checkpoint.save(model, optimizer, history)
    except KeyboardInterrupt as interrupt:
        kept = f"the first {len(history)} of {epochs} epochs are in {folder}; the same call resumes after them"
        interrupt.add_note(f"Training was interrupted; {kept if checkpoint else 'give a folder to be able to resume'}.")
        raise
    finally:
        model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return history


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient, of which there must be some."""
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise TorchsliceError("the model has no parameter that requires a gradient; unfreeze what is to be trained.")
    return found


def cosine(learning_rate: float, step: int, total: int) -> float:
    """Return the learning rate of a step in 0..total on half a cosine from `learning_rate` to zero.

    >>> cosine(0.1, 5, 10)
    0.05
    """
    return learning_rate * (1 + math.cos(math.pi * step / total)) / 2


def accuracy(
    model: nn.Module,
    data: Data,
    split: Split,
    *,
    batch_size: int = 512,
    placement: Placement | None = None,
    ranks: Ranks | None = None,
) -> float:
    """Return the share of a split's images, in [0, 1], that a model classifies as labelled."""
    placement, ranks = placement or choose_placement(), ranks or Ranks()
    right = torch.zeros((), dtype=torch.int64, device=placement.device)
    memory_format = fast_format(model, data.example.to(placement.device))
    with evaluating(model), placement.autocast():
        for images, labels in in_order(data, split, batch_size=batch_size, device=placement.device, ranks=ranks):
            right += (model(images.clone(memory_format=memory_format)).argmax(1) == labels).sum()
    return ranks.sum(right).item() / len(split)


def _losses(means: RunningMeans, epoch: int, learning_rate: float) -> str:
    values = means.read()
    if not math.isfinite(values["loss"]):
        raise TorchsliceError(
            f"the loss is no longer finite in epoch {epoch}. Lower learning_rate (now {learning_rate:g}) or the "
            "weights of the objective, or use precision='fp32'; finished epochs stay in the folder, if one was given."
        )
    return "  ".join(f"{name} {value:.3f}" for name, value in values.items() if "accuracy" not in name)


def _check_settings(**settings: Any) -> None:
    for name, value in settings.items():
        if name in ("epochs", "batch_size") and value < 1:
            raise TorchsliceError(f"{name} must be at least 1, got {value}.")
        if name == "learning_rate" and not 0 < value < math.inf:
            raise TorchsliceError(f"learning_rate must be a number above 0, got {value}.")
        if name == "momentum" and not 0 <= value < 1:
            raise TorchsliceError(f"momentum must be in [0, 1), got {value}.")
        if name == "weight_decay" and not 0 <= value < math.inf:
            raise TorchsliceError(f"weight_decay must be 0 or more, got {value}.")


def _check_output(model: nn.Module, data: Data, placement: Placement) -> None:
    example = data.example.to(placement.device)
    try:
        with evaluating(model), placement.autocast():
            logits: Tensor = model(example)
    except (RuntimeError, ValueError) as error:
        shape = "x".join(map(str, example.shape[1:]))
        raise TorchsliceError(f"the model cannot take the {shape} images of {data.name}: {error}") from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (len(example), len(data.classes)):
        given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TorchsliceError(
            f"the model's output for {len(example)} images of {data.name} is {given}; "
            f"needed are logits [{len(example)}, {len(data.classes)}], one for each class."
        )
