"""torchslice restructure."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import TorchsliceError
from .common import DataDir, Device, DeviceOption, Json, RunFolder, Seed, check_writable, emit, say
from .critical import Metric, Share, critical_of, mean_scores, metric_of, open_plain


class Removal(StrEnum):
    """What is removed in every iteration, see `torchslice.restructure`."""

    lamp = "lamp"
    global_ = "global"
    uniform_plus = "uniform+"
    erk = "erk"
    structured = "structured"


def restructure(
    run: RunFolder,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Artefact to write, such as small.safetensors.")],
    method: Annotated[
        Removal, typer.Option(help="Which weights to remove; structured removes the least critical neurons.")
    ] = Removal.lamp,
    param_retention: Annotated[float | None, typer.Option(help="Target: share of the parameters that stay.")] = None,
    mac_retention: Annotated[
        float | None, typer.Option(help="Target: share of the multiply-accumulates, zeros left out.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Target of structured: milliseconds for one image, on this machine.")
    ] = None,
    no_slice: Annotated[bool, typer.Option("--no-slice", help="Keep all neurons and only compress.")] = False,
    share: Share = None,
    metric: Metric = None,
    rate: Annotated[float, typer.Option(help="Share of the surviving weights that an iteration removes.")] = 0.2,
    epochs: Annotated[int, typer.Option(help="Of training, after the cut and in every iteration.")] = 3,
    max_accuracy_loss: Annotated[
        float, typer.Option(help="Stop where more validation accuracy is lost to the whole network; 1 is never.")
    ] = 0.01,
    patience: Annotated[int, typer.Option(help="Further trainings of an iteration to win accuracy back.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of every training, at its start.")] = 0.01,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Compress the network of a run: keep its critical neurons, then remove more and retrain, step by step.

    Name one target. Accuracies printed here are on validation images; torchslice evaluate looks at the test images.

    Example:  torchslice restructure runs/r20 --method lamp --param-retention 0.05 --out small.safetensors
    """
    check_writable(out)
    used = metric_of(metric, share is not None or method is Removal.structured, "--share or --method structured")
    if no_slice and share is not None:
        raise TorchsliceError("--no-slice keeps all neurons, so --share plays no part; give one of the two.")
    from .. import semantic, use

    opened, data, network = open_plain(run, data_dir, device.value)
    running: dict[str, Any] = {"seed": seed, "device": device.value}
    contributed = cache(lambda: semantic.contributions(network, data, metric=used, **running))
    kept = None if no_slice else critical_of(opened, contributed, share=share, metric=used)
    start = "the whole network" if kept is None else f"{kept.neuron_retention:.1%} of the neurons"
    say(f"{method.value} from {start} of {run}: {epochs} epochs in every iteration; result in {out}")
    made = use.restructure(
        network,
        kept,
        data,
        method=method.value,
        param_retention=param_retention,
        mac_retention=mac_retention,
        latency_ms=latency_ms,
        scores=mean_scores(contributed(), used) if method is Removal.structured else None,
        rate=rate,
        epochs_per_iteration=epochs,
        max_accuracy_loss=max_accuracy_loss,
        patience=patience,
        learning_rate=learning_rate,
        **running,
    )
    last = made[made.kept]
    metrics = {"param_retention": last.param_retention, "mac_retention": last.mac_retention, **made.to_plain()}
    use.save(made.model, out, classes=data.classes, preprocessing=data.preprocessing, slice=kept, metrics=metrics)
    result = {"artefact": str(out), "iterations": made.iterations, **metrics}
    emit(result, f"{made}\nNext:  torchslice evaluate {out} {opened.recipe.data}", as_json=as_json)
