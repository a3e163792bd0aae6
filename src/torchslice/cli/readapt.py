"""torchslice readapt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import TorchsliceError
from .common import (
    DataDir,
    DataOptions,
    DataSet,
    Device,
    DeviceOption,
    Json,
    RunFolder,
    Seed,
    check_writable,
    emit,
    pairs,
    say,
)
from .critical import Metric, mean_scores, metric_of, open_plain


def readapt(
    run: RunFolder,
    data: DataSet,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Artefact to write, such as adapted.safetensors.")],
    param_share: Annotated[
        float | None,
        typer.Option(
            help="Train the neurons that contribute most per parameter, up to this share of all parameters "
            "(default: the run's slices)."
        ),
    ] = None,
    metric: Metric = None,
    classifier: Annotated[bool, typer.Option("--classifier", help="Train the rows of the class scores too.")] = False,
    replay: Annotated[
        str, typer.Option(metavar="R,S,...", help="Old images per new one; of several values the best is kept.")
    ] = "1",
    epochs: Annotated[int, typer.Option(help="Passes over the new samples.")] = 10,
    learning_rate: Annotated[float, typer.Option(help="At the start; it falls to zero on half a cosine.")] = 0.005,
    data_option: DataOptions = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Adapt the network of a run to new samples of its classes by training its critical neurons only.

    The new samples are the training images of DATA, which needs the classes of the run by name. Accuracies printed here
    are on validation images; torchslice evaluate looks at the test images.

    Example:  torchslice readapt runs/r20 folder:tonight --param-share 0.2 --out adapted.safetensors
    """
    check_writable(out)
    used = metric_of(metric, param_share is not None, "--param-share")
    import torch

    from .. import data as data_sets
    from .. import semantic, use
    from ..core.find import find_neurons
    from ..data import Split
    from ..slices import union
    from ..use.evaluate import device_of

    ratios = _numbers(replay)

    opened, old, network = open_plain(run, data_dir, device.value)
    given = data_sets.load(data, data_dir, seed=seed, **pairs(data_option))
    labels = torch.tensor(old.class_indices(given.classes))[given.train.labels]
    running: dict[str, Any] = {"seed": seed, "device": device.value}
    if param_share is None:
        critical = union(opened.slices().values())
    else:
        neurons = find_neurons(network, old.example.to(device_of(network)))
        scores = mean_scores(semantic.contributions(network, old, metric=used, **running), used)
        critical = use.worthiest(network, neurons, scores, param_share)
    say(f"training {critical.neuron_retention:.1%} of the neurons of {run} on {len(labels):,} new samples of {data}")
    made = use.readapt(
        network,
        critical,
        Split(given.train.images, labels),
        old,
        replay=ratios,
        classifier=classifier,
        epochs=epochs,
        learning_rate=learning_rate,
        **running,
    )
    metrics = {"neuron_retention": critical.neuron_retention, **made.to_plain()}
    use.save(made.model, out, classes=old.classes, preprocessing=old.preprocessing, slice=critical, metrics=metrics)
    text = f"{made}\nNext:  torchslice evaluate {out} {data}"
    emit({"artefact": str(out), **metrics}, text, as_json=as_json)


def _numbers(text: str) -> list[float]:
    """Read numbers separated by commas."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise TorchsliceError(f"--replay {text!r} is not a number, or several such as 0,1.") from error
