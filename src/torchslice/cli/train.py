"""torchslice train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DataDir,
    DataOptions,
    DataSet,
    Device,
    DeviceOption,
    Json,
    Method,
    Model,
    ModelArguments,
    Precision,
    Seed,
    check_writable,
    chosen,
    emit,
    pairs,
    say,
)

#: What an option needs to play a part: another one, and its values.
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("standard_epochs", "retention", "taper"), ("method", (Method.modular,))),
    **dict.fromkeys(("cohesion_weight", "coupling_weight"), ("method", (Method.mwt,))),
}


def train(
    model: Model,
    data: DataSet,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run: new, or one to go on with.")],
    method: Annotated[
        Method, typer.Option(help="modular: sub-tasks on class slices; mwt: with gates, as published; or standard.")
    ] = Method.modular,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 30,
    learning_rate: Annotated[float, typer.Option(help="At the start; it falls to zero on half a cosine.")] = 0.05,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 128,
    retention: Annotated[
        float | None, typer.Option(help="modular: share of all neurons that a class gets.", show_default="0.15")
    ] = None,
    taper: Annotated[
        float | None,
        typer.Option(help="modular: share of the last layer over that of the first.", show_default="0.1"),
    ] = None,
    standard_epochs: Annotated[
        int | None, typer.Option(help="modular: epochs before slices are chosen.", show_default="half")
    ] = None,
    cohesion_weight: Annotated[
        float | None, typer.Option(help="mwt: weight of the cohesion loss.", show_default="0.5")
    ] = None,
    coupling_weight: Annotated[
        float | None, typer.Option(help="mwt: weight of the coupling loss.", show_default="1.5")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="auto takes bf16 where the hardware computes in it.")] = (
        Precision.auto
    ),
    train_limit: Annotated[int | None, typer.Option(help="Use so many training images (default: all).")] = None,
    model_argument: ModelArguments = None,
    data_option: DataOptions = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Train a network so that it can be cut, or the usual way; the same command goes on after the last finished epoch.

    Example:  torchslice train resnet20 cifar10 --data-dir data --epochs 60 --out runs/r20
    """
    check_writable(out / "run.json")
    from ..runs import Recipe, Run, absolute
    from ..training import choose_placement

    placement = choose_placement(device.value, precision.value)
    recipe = Recipe(
        model=model,
        data=absolute(data),
        method=method.value,
        model_arguments=pairs(model_argument),
        data_options=pairs(data_option),
        train_limit=train_limit,
        **chosen(
            NEEDS,
            {"method": method},
            standard_epochs=standard_epochs,
            retention=retention,
            taper=taper,
            cohesion_weight=cohesion_weight,
            coupling_weight=coupling_weight,
        ),
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        precision=placement.precision,
        seed=seed,
    )
    images = recipe.load_data(data_dir)
    network = recipe.network(images)  # says what is wrong with the model before a folder is made
    run = Run.start(out, recipe, images, data_dir=data_dir)
    done = run.epochs_done
    say(f"{method.value} training of {model}, {sum(p.numel() for p in network.parameters()):,} parameters")
    say(f"on {images!r}")
    say(f"{epochs} epochs of {batch_size} images a step on {placement.device}, {placement.precision}; result in {out}")
    if done:
        say(f"{done} epochs are done" + ("; nothing is left to do" if done >= epochs else "; going on after them"))
    history = run.train(images, device=device.value, progress=done < epochs)
    last = history[-1]
    result = {"run": str(out), "resumed_after": done, "history": history}
    text = f"{out}: validation accuracy {last['validation_accuracy']:.2%} after {last['epoch']} epochs\n"
    emit(result, f"{text}Next:  torchslice slice {out} --by {run.by}", as_json=as_json)
