"""torchslice slice."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from .common import DataDir, Device, DeviceOption, Gates, Json, RunFolder, Seed, check_writable, chosen, emit, say


class By(StrEnum):
    """What tells which neurons a class needs."""

    training = "training"
    gates = "gates"
    contribution = "contribution"


class Slicer(StrEnum):
    """How many neurons are kept, see `torchslice.semantic.Rule`."""

    semantic = "semantic"
    category = "category"
    global_ = "global"
    budget = "budget"


class Criterion(StrEnum):
    """What theta is of, see `torchslice.semantic.Rule`."""

    cka = "cka"
    mass = "mass"


class Positions(StrEnum):
    """What is compared for the criterion cka, see `torchslice.semantic.Rule`."""

    mean = "mean"
    all = "all"


#: What options are where they are not given. None is what they are for typer, so that it shows which ones were.
DEFAULTS: dict[str, Any] = {
    **{"threshold": 0.9, "metric": "taylor", "slicer": "semantic", "criterion": "cka", "theta": 0.95, "slope": 1.0},
    **{"positions": "all", "share": 0.5, "taper": 0.1, "samples": 256, "gates": "fold"},
}
#: What an option needs to play a part: another one, and its values.
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "threshold": ("by", ("gates",)),
    **dict.fromkeys(("metric", "slicer", "samples", "gates"), ("by", ("contribution",))),
    **dict.fromkeys(("criterion", "theta", "slope"), ("slicer", ("semantic",))),
    "share": ("slicer", ("category", "global", "budget")),
    "taper": ("slicer", ("budget",)),
    "positions": ("criterion", ("cka",)),
}


def _option(name: str, help: str, **more: Any) -> Any:
    return typer.Option(f"--{name}", help=help, show_default=str(DEFAULTS[name]), **more)


def slice(
    run: RunFolder,
    by: Annotated[
        By | None,
        typer.Option(
            help="What tells which neurons a class needs: training (modular runs; they were given slices), gates (mwt "
            "runs) or contribution (any).",
            show_default="training, gates or contribution, by the method of the run",
        ),
    ] = None,
    threshold: Annotated[
        float | None, _option("threshold", "gates: keep what is on for this share of a class's training images.")
    ] = None,
    metric: Annotated[
        str | None,
        _option("metric", "contribution: avg, var, ens, taylor, deeplift, or one of yours.", metavar="NAME"),
    ] = None,
    slicer: Annotated[
        Slicer | None,
        _option("slicer", "contribution: keep what reaches theta, a share per class, per layer, or of all neurons."),
    ] = None,
    criterion: Annotated[
        Criterion | None,
        _option("criterion", "semantic: theta is the similarity to the whole layer, or the share of its mass."),
    ] = None,
    theta: Annotated[
        float | None, _option("theta", "semantic: how much the kept neurons must reach, in (0, 1].")
    ] = None,
    slope: Annotated[
        float | None, _option("slope", "semantic: of theta over depth; early layers must reach more. 0 is one theta.")
    ] = None,
    positions: Annotated[
        Positions | None, _option("positions", "cka: compare means over the positions of each image, or whole maps.")
    ] = None,
    share: Annotated[
        float | None, _option("share", "category, global, budget: share of the neurons to keep, in (0, 1].")
    ] = None,
    taper: Annotated[
        float | None, _option("taper", "budget: share of the last layer over that of the first, in (0, 1].")
    ] = None,
    samples: Annotated[int | None, _option("samples", "contribution: training images per class.")] = None,
    gates: Annotated[
        Gates | None, _option("gates", "contribution: fold the gates of an mwt run into its weights, or drop them.")
    ] = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Find the slice of every class in a run; they are kept in RUN/slices.json.

    An option that would play no part is refused.

    Example:  torchslice slice runs/r20 --by contribution --metric taylor --theta 0.95
    """
    from ..runs import Run

    opened = Run.open(run)
    by = by or By(opened.by)
    options: dict[str, Any] = DEFAULTS | chosen(
        NEEDS,
        {"by": by, **DEFAULTS},
        threshold=threshold,
        metric=metric,
        slicer=slicer,
        criterion=criterion,
        theta=theta,
        slope=slope,
        positions=positions,
        share=share,
        taper=taper,
        samples=samples,
        gates=gates,
    )
    threshold, count = options.pop("threshold"), options.pop("samples")
    check_writable(run / "slices.json")
    data = opened.load_data(data_dir)
    what = {By.training: "slices", By.gates: "gates"}.get(by) or f"{options['metric']} contributions"
    say(f"{what} of {opened.recipe.model} on training images of {data.name}; result in {run}")
    result: dict[str, Any] = {"run": str(run), "by": by.value}
    found: object
    if by is By.gates:
        found = measured = opened.find_slices(data, threshold=threshold, device=device.value)
        result |= {"threshold": threshold, "report": measured.to_plain()}
    elif by is By.training:
        found = slices = opened.find_trained_slices()
        result |= slices.summary()
    else:
        found = slices = opened.find_semantic_slices(
            data, samples_per_class=count, seed=seed, device=device.value, **options
        )
        result |= slices.summary()
    next_step = f"Next:  torchslice extract {run} --classes {','.join(data.classes[:2])} --out part.safetensors"
    emit(result, f"{found}\n{next_step}", as_json=as_json)
