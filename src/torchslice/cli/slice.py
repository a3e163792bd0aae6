"""torchslice slice."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import TorchsliceError
from ..find import gates as gated_slices
from ..find import semantic
from ..find.gates import GatedModel
from ..find.semantic import METRICS, ByGroup, PerClass, PerLayer, ReachTheta
from ..runs.run import SHARE, Run, prefixes
from ..runs.slicefile import SliceFile, digest_of_model
from ..runs.source import Opening
from ..slices import union
from ..tables import percent
from . import common
from .options import Part, field_help

STRATEGIES = {"reach-theta": ReachTheta, "per-class": PerClass, "per-layer": PerLayer, "by-group": ByGroup}
FIELDS = {flag: {entry.name for entry in fields(kind)} for flag, kind in STRATEGIES.items()}
#: What an option needs to play a part: another one, and its values.
NEEDS = {
    "share": ("by", ("training",)),
    "frequency_threshold": ("by", ("gates",)),
    **dict.fromkeys(("metric", "samples_per_class", "strategy", "tied", "gates"), ("by", ("contribution",))),
    **{name: ("strategy", tuple(f for f in FIELDS if name in FIELDS[f])) for name in set().union(*FIELDS.values())},
}


def _of(name: str) -> Any:
    """Return an option of strategies; its help and defaults are theirs."""
    kinds = {flag: kind for flag, kind in STRATEGIES.items() if name in FIELDS[flag]}
    texts = {field_help(kind).get(name, "") for kind in kinds.values()} - {""}
    defaults = ", ".join(f"{getattr(kind(), name)} for {flag}" for flag, kind in kinds.items())
    return typer.Option(help=f"{', '.join(kinds)}: {' / '.join(sorted(texts))}", show_default=defaults)


def slice(
    context: typer.Context,
    source: common.SourceName,
    data: common.SourceData = None,
    opening: Annotated[Opening, Part(skip=("slices",))] = Opening(),
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File to write (default: slices.json in the run, whose slices it replaces; needed without one).",
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        Literal["training", "gates", "contribution"] | None,
        typer.Option(
            help="What tells which neurons a class needs: the rankings of sub-task training, gates, or contribution "
            "(any network).",
            show_default="training, gates or contribution, by the method of the run",
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="training: share of the network that a class gets.")] = SHARE,
    frequency_threshold: Annotated[
        float, typer.Option(help="gates: keep what is on for this fraction of a class's training samples.")
    ] = 0.9,
    metric: common.Metric = "taylor",
    samples_per_class: Annotated[int, typer.Option(min=1, help="contribution: training samples per class.")] = 256,
    strategy: Annotated[
        Literal["reach-theta", "per-class", "per-layer", "by-group"],
        typer.Option(
            help="contribution: reach theta, a fraction per class or per layer, or the semantic groups of a class."
        ),
    ] = "reach-theta",
    theta: Annotated[float | None, _of("theta")] = None,
    slope: Annotated[float | None, _of("slope")] = None,
    criterion: Annotated[str | None, _of("criterion")] = None,
    neuron_fraction: Annotated[float | None, _of("neuron_fraction")] = None,
    outside: Annotated[float | None, _of("outside")] = None,
    tied: Annotated[
        bool, typer.Option("--tied/--untied", help="contribution: choose neurons that leave together as one.")
    ] = True,
    gates: common.GatesOption = "fold",
    seed: common.Seed = 0,
    device: common.DeviceOption = "auto",
) -> common.Shown:
    """Find the slice of every class in a trained network.

    An option that would play no part is refused.

    Example:  torchslice slice runs/r20 --by contribution --theta 0.9
    """
    run = Run.open(source) if Path(source).is_dir() else None
    if run is None and out is None:
        raise TorchsliceError(f"{source} is no run to keep slices in; name the file to write: out=FILE.")
    how = by or ("contribution" if run is None else run.by)
    common.check_needs(context, NEEDS, by=how)
    method = "" if run is None else run.recipe.method.method
    if (how == "gates" and method != "gates") or (how == "training" and method != "subtasks"):
        lack = "has no gates" if how == "gates" else "was given no rankings in training"
        raise TorchsliceError(f"{source} {lack}; give --by {'contribution' if run is None else run.by}.")
    for name, value in (("frequency_threshold", frequency_threshold), ("share", share)):
        if not 0 < value <= 1:
            raise TorchsliceError(f"{name} must be in (0, 1], got {value:g}.")
    given = {name: context.params[name] for name in FIELDS[strategy]}
    chosen = STRATEGIES[strategy](**{name: value for name, value in given.items() if value is not None})
    _ = METRICS[metric]  # says which there are
    opened = opening.open(source, data, seed=seed, device=device)
    common.check_gates(context, opened)
    where = out or Path(source) / "slices.json"
    common.say(f"slices by {how} from training samples of {opened.task.name}; result in {where}")
    result: dict[str, Any] = {"source": source, "by": how}
    found: Any
    slices: Any
    if isinstance(opened.network, GatedModel) and how == "gates":
        slices = gated_slices.class_slices(opened.network, opened.task, frequency_threshold=frequency_threshold)
        found = gated_slices.report(opened.network, opened.task, slices)
        about = {"frequency_threshold": frequency_threshold, "report": found.to_plain()}
        result |= about
    elif run is not None and how == "training":
        slices = prefixes(run.rankings(), share)
        kept = {name: slice_.neuron_retention for name, slice_ in slices.items()}
        together = union(slices.values()).neuron_retention
        found = f"every class keeps {percent(max(kept.values()))} of the neurons, all together {percent(together)}"
        about = {"share": share}
        result |= {**about, "neuron_retention": {"critical": together, "classes": kept}}
    else:
        neurons = opened.neurons(gates=gates)
        scores = semantic.contributions(
            neurons, opened.task, metric=metric, samples_per_class=samples_per_class, seed=seed
        )
        found = slices = semantic.class_slices(neurons, opened.task, scores, strategy=chosen, tied=tied)
        about = {**slices.summary(), "critical": slices.critical.to_plain()}
        result |= slices.summary()
    about = {"by": how, **about}
    if out is not None:
        SliceFile(out).write(slices, digest_of_model(opened.model), about)
    elif run is not None:
        run.keep_slices(slices, about)
    words = [*opening.again(opened), *([] if out is None else ["--slices", out])]
    pair = ",".join(opened.task.classes[:2])
    step = common.next_step("extract", *words, "--classes", pair, "--out", "part.safetensors")
    return result, f"{found}\n{step}"
