"""torchslice slice."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from .common import DataDir, Device, DeviceOption, Gates, Json, RunFolder, Seed, check_writable, emit, say


class By(StrEnum):
    """What tells which neurons a class needs."""

    gates = "gates"
    contribution = "contribution"


class Slicer(StrEnum):
    """How many neurons are kept, see `torchslice.semantic.Rule`."""

    semantic = "semantic"
    category = "category"
    global_ = "global"


class Criterion(StrEnum):
    """What theta is of, see `torchslice.semantic.Rule`."""

    cka = "cka"
    mass = "mass"


class Positions(StrEnum):
    """What is compared for the criterion cka, see `torchslice.semantic.Rule`."""

    mean = "mean"
    all = "all"


def slice(
    run: RunFolder,
    by: Annotated[
        By, typer.Option(help="What tells which neurons a class needs: gates (modular runs) or contributions (any).")
    ] = By.gates,
    threshold: Annotated[
        float, typer.Option(help="gates: keep neurons that are on for this share of a class's training images.")
    ] = 0.9,
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="contribution: avg, var, ens, taylor, deeplift, or one of yours.")
    ] = "taylor",
    slicer: Annotated[
        Slicer, typer.Option(help="contribution: keep what reaches theta, or a share per class, or per layer.")
    ] = Slicer.semantic,
    criterion: Annotated[
        Criterion, typer.Option(help="semantic: theta is the similarity to the whole layer, or the share of its mass.")
    ] = Criterion.cka,
    theta: Annotated[float, typer.Option(help="semantic: how much the kept neurons must reach, in (0, 1].")] = 0.95,
    positions: Annotated[
        Positions, typer.Option(help="cka: compare means over the positions of each image, or whole maps.")
    ] = Positions.mean,
    share: Annotated[float, typer.Option(help="category, global: share of the neurons to keep, in (0, 1].")] = 0.5,
    samples: Annotated[int, typer.Option(help="contribution: training images per class.")] = 256,
    gates: Annotated[
        Gates, typer.Option(help="contribution: fold the gates of a modular run into its weights, or drop them.")
    ] = Gates.fold,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Find the slice of every class in a run; they are kept in RUN/slices.json.

    Example:  torchslice slice runs/r20 --by contribution --metric taylor --theta 0.95
    """
    from ..runs import Run

    opened = Run.open(run)
    check_writable(run / "slices.json")
    data = opened.load_data(data_dir)
    what = "gates" if by is By.gates else f"{metric} contributions"
    say(f"{what} of {opened.recipe.model} on training images of {data.name}; result in {run}")
    result: dict[str, Any] = {"run": str(run), "by": by.value}
    found: object
    if by is By.gates:
        found = measured = opened.find_slices(data, threshold=threshold, device=device.value)
        result |= {"threshold": threshold, "report": measured.to_plain()}
    else:
        found = slices = opened.find_semantic_slices(
            data,
            metric=metric,
            samples_per_class=samples,
            seed=seed,
            gates=gates.value,
            device=device.value,
            slicer=slicer.value,
            criterion=criterion.value,
            theta=theta,
            positions=positions.value,
            share=share,
        )
        result |= slices.summary()
    next_step = f"Next:  torchslice extract {run} --classes {','.join(data.classes[:2])} --out part.safetensors"
    emit(result, f"{found}\n{next_step}", as_json=as_json)
