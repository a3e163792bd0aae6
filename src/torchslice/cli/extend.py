"""torchslice extend."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import TorchsliceError
from .common import (
    DataDir,
    DataOptions,
    DataSet,
    Device,
    DeviceOption,
    Json,
    Seed,
    check_writable,
    class_names,
    emit,
    pairs,
    say,
)
from .critical import Metric, Share, critical_of, metric_of, open_plain
from .evaluate import task_of

if TYPE_CHECKING:
    from ..data import Data


def extend(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of a run, or a file that torchslice saved.")],
    data: DataSet,
    classes: Annotated[str, typer.Option(metavar="A,B,...", help="Names of the new classes, which DATA has.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Artefact to write, such as ten.safetensors.")],
    share: Share = None,
    metric: Metric = None,
    settle: Annotated[
        int, typer.Option(metavar="EPOCHS", min=0, help="First train the critical neurons to answer alone.")
    ] = 0,
    widen: Annotated[
        float | None, typer.Option(metavar="FACTOR", help="First make every layer so many times as wide, such as 1.25.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart/--keep", help="Draw the neurons that learn anew first, or keep their values.")
    ] = True,
    replay: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the known classes' images to train on as well.")
    ] = 0.0,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    learning_rate: Annotated[float, typer.Option(help="At the start; it falls to zero on half a cosine.")] = 0.05,
    allow_import: Annotated[
        bool, typer.Option("--allow-import", help="Permit a file whose network is built by a module of your own.")
    ] = False,
    data_option: DataOptions = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Teach a network new classes by its non-critical neurons; those it knows are answered by its slice, unchanged.

    Images of the known classes come from the run; for a file, from DATA. Accuracies printed here are on validation
    images; torchslice evaluate looks at the test images.

    Example:  torchslice extend runs/five mnist --classes 5,6,7,8,9 --share 0.5 --settle 5 --out ten.safetensors
    """
    check_writable(out)
    used = metric_of(metric, share is not None, "--share")
    from .. import data as data_sets
    from .. import semantic, use
    from ..slices import union
    from ..use.evaluate import device_of
    from ..use.extended import remembered

    images = data_sets.load(data, data_dir, seed=seed, **pairs(data_option))
    task = images.restrict(class_names(classes))
    running: dict[str, Any] = {"seed": seed, "device": device.value}
    opened: Any = None
    if source.is_dir():
        opened, known, network = open_plain(source, data_dir, device.value)
        network.preprocessing = known.preprocessing  # type: ignore[assignment]
    else:
        network, known = _load(source, images, allow_import, device.value, share)
    example = known.example.to(device_of(network))
    start = use.Extended.start(network, known.classes, example)
    if twice := [name for name in task.classes if name in start.classes]:
        raise TorchsliceError(f"{source} knows {', '.join(twice)} already; name new classes only.")
    *earlier, last = start.tasks
    if earlier and len(last.classes) < 2:
        raise TorchsliceError(
            f"{source} learned {last.classes[0]!r} alone, so contributions do not tell which neurons it needs; "
            "extend it in Python with a slice of your own."
        )
    learned = known.restrict(last.classes)
    contributed = partial(semantic.contributions, start.network(), learned, metric=used, **running)
    critical = critical_of(opened, contributed, share=share, metric=used)
    critical = union([critical, *(task.part for task in earlier if task.part is not None)])
    if settle:
        say(f"training {critical.neuron_retention:.1%} of the neurons to answer {', '.join(last.classes)} alone")
        start = start.on(use.settle(start, critical, learned, epochs=settle, **running).model)
    if widen is not None:
        wide = use.widen(start.model, example, factor=widen, seed=seed)
        start, critical = start.within(wide), wide.lift(critical)
    old = remembered(known, replay, seed=seed) if replay else None
    say(f"learning {', '.join(task.classes)} with the other neurons, {epochs} epochs; result in {out}")
    running |= {"epochs": epochs, "learning_rate": learning_rate}
    made = use.extend(start, critical, task, replay=old, restart=restart, **running)
    figures = {"neuron_retention": critical.neuron_retention, **made.to_plain()}
    del figures["tasks"]
    made.save(out, preprocessing=known.preprocessing, slice=critical, metrics=figures)
    result = {"artefact": str(out), "known": start.classes, "new": task.classes, **figures}
    emit(result, f"{made}\nNext:  torchslice evaluate {out} {data}", as_json=as_json)


def _load(source: Path, images: Data, allow_import: bool, device: str, share: float | None) -> tuple[Any, Data]:
    """Return the network of a file, and the images of its classes."""
    from ..training import choose_placement
    from ..use import load

    network: Any = load(source, allow_import=allow_import).to(choose_placement(device).device)
    if network.classes is None:
        raise TorchsliceError(f"{source} does not name the classes it knows; save it with classes=.")
    if share is None:
        raise TorchsliceError(f"{source} has no class slices to keep; say how much is critical: --share 0.5.")
    return network, task_of(source, network, images)
