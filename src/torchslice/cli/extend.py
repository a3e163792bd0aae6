"""torchslice extend."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import maintain
from ..artefact import save
from ..errors import TorchsliceError
from ..find.semantic import contributions
from ..graph.find import find_neurons
from ..maintain import Extended
from ..runs.source import Opening
from ..slices import union
from ..training import Training
from . import common
from .critical import check_critical, critical_of
from .options import Part


def extend(
    context: typer.Context,
    source: common.SourceName,
    classes: common.Classes,
    out: common.Out,
    data: common.SourceData = None,
    new: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Data set that has the new classes (default: DATA).", show_default=False),
    ] = None,
    opening: Opening = Opening(),
    neuron_fraction: common.NeuronFraction = None,
    metric: common.Metric = "taylor",
    settle: Annotated[
        int, typer.Option(metavar="EPOCHS", min=0, help="First train the critical neurons to answer alone.")
    ] = 0,
    widen: Annotated[
        float | None, typer.Option(metavar="FACTOR", help="First make every layer so many times as wide, such as 1.25.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart/--keep", help="Draw the neurons that learn anew first, or keep their values.")
    ] = True,
    replay: Annotated[float, typer.Option(help="Fraction of the known classes' samples to train on as well.")] = 0.0,
    training: Annotated[Training, Part(skip=("progress",))] = Training(),
) -> common.Shown:
    """Teach a network new classes by its non-critical neurons; those it knows are answered as before.

    Accuracies printed here are on validation samples; torchslice evaluate looks at the test samples.

    Example:  torchslice extend runs/five --new mnist --classes 5,6,7,8,9 --neuron-fraction 0.5 --out ten.safetensors
    """
    maintain.check_extending(replay=replay, settle=settle, widen=widen)
    none_left = "" if widen else "none is left for new classes, so give --widen 1.25 or a smaller fraction"
    check_critical(context, "neuron_fraction", all_of_them=none_left)
    common.check_training(context, training)
    if new is None and data is None:
        raise TorchsliceError(f"name the data set that has the new classes: new=DATA, for {source}.")
    opened = opening.open(source, data, seed=training.seed, device=training.device, new=new)
    other = opened.given if new is None else opening.load(new, seed=training.seed)
    task, known, neurons = other.restrict(common.names(classes)), opened.task, opened.neurons()
    start = Extended.start(neurons, known.classes)
    if opened.extension is not None:
        start = Extended.of(neurons, opened.extension)
    options: dict[str, Any] = {"known": known, "replay": replay, "settle": settle, "widen": widen}
    maintain.check_extension(start, task, **options)
    *earlier, last = start.tasks
    if earlier and len(last.classes) < 2:
        raise TorchsliceError(
            f"{source} learned {last.classes[0]!r} alone, so contributions do not tell which neurons it needs; "
            "extend it in Python with a slice of your own."
        )
    if earlier and neuron_fraction is None and opening.slices is None:
        raise TorchsliceError(f"{source} has no class slices to keep; say how much is critical: neuron_fraction=0.5.")
    found, seed = None, training.seed
    if neuron_fraction is not None:
        learned = known.restrict(last.classes)
        answering = find_neurons(start.network(), learned.example, classes=learned.classes)
        found = contributions(answering, learned, metric=metric, seed=seed)
    critical = critical_of(opened, found, neuron_fraction=neuron_fraction, seed=seed)
    critical = union([critical, *(part.slice_ for part in earlier if part.slice_ is not None)])
    common.say(
        f"learning {', '.join(task.classes)} with {1 - critical.neuron_retention:.1%} of the neurons of {source}"
    )
    made = maintain.extend(start, task, critical, restart=restart, training=training, **options)
    figures = {"neuron_retention": critical.neuron_retention, **made.to_plain()}
    kept = union(part.slice_ for part in made.tasks if part.slice_ is not None)
    save(made, out, preprocessing=known.preprocessing, slice=kept, metrics=figures)
    result = {"artefact": str(out), "known": start.classes, "new": task.classes, **figures}
    words = opened.data if new is None else opening.words(new)
    if not {*start.classes, *task.classes} <= {*other.classes}:
        words = ["DATA"]  # of all its classes, which neither data set has
    return result, f"{made}\n{common.next_evaluate(out, opened, words)}"
