"""One page about a network, in one file that needs nothing else: what can be cut, what classes share, what parts cost.

Shapes: C classes, N neurons of a layer.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..cut.extract import retention
from ..data import Task, check_task
from ..files import atomic_write
from ..find.semantic import Contributions, Groups, groups
from ..find.semantic.contributions import check_scores
from ..graph.neurons import Neurons, check_neurons
from ..imports import import_optional
from ..rankings import by_mean_score, scaled, widths
from ..training import Accuracy, cost
from ..training.outcome import Row
from . import figures

BUDGETS = 14  # sizes that the slider of the page has
SMALLEST = 0.1  # share of the widths of the smallest
ROUND_TO = 8  # as `reuse` does
LARGEST = 40  # groups that are listed
CELLS = 200_000  # of the heat maps of all layers together, at most; of more layers an even choice is shown


@dataclass(frozen=True)
class Report:
    """A page of HTML that stands alone; notebooks show it."""

    html: str

    def save(self, path: str | Path) -> None:
        """Write it into a file."""
        atomic_write(path, self.html)

    def _repr_html_(self) -> str:
        source = self.html.replace("&", "&amp;").replace('"', "&quot;")
        return f'<iframe srcdoc="{source}" style="width:100%;height:40em;border:0"></iframe>'

    def __repr__(self) -> str:
        return f"Report({len(self.html.encode()):,} bytes; write it with save(path))"


def report(
    neurons: Neurons,
    task: Task,
    scores: Contributions | None = None,
    *,
    metric: str | None = None,
    accuracy: Accuracy | None = None,
    rows: Sequence[Row] = (),
    stages: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    title: str = "A network",
    words: Sequence[str] = ("SOURCE",),
    notes: Sequence[str] = (),
) -> Report:
    """Make a page about a network: what it is, what can be cut, and as much more as is given.

    Args:
        scores: from `contributions(neurons, task)`: what classes share, their groups, and a picker of classes that says
            what a part for them keeps at any size, and costs. Without them all this is left out.
        metric: which of the scores; needed when there are several.
        accuracy: on validation samples, from `accuracy(model, task, "validation")`.
        rows: of its training, as `fit` returns them: curves.
        stages: from `judge.evaluate_stages(...).to_plain()`: what a sub-model was worth at every stage, and controls.
        metrics: figures that were saved with it.
        words: that name network and data on the command line, for the commands that the page shows.
        notes: sentences that stand at the top, such as what is missing.

    >>> page = ts.report(neurons, task, scores, title="Digits")
    >>> page.save(folder / "report.html")
    """
    check_neurons(neurons)
    check_task(task, neurons)
    if scores is not None:
        check_scores(scores, neurons, task)
    found = None if scores is None else groups(neurons, scores, metric=metric)
    size = cost(neurons.model, task.example)
    facts = {"classes": len(task.classes), "neurons": len(neurons), "layers with neurons": len(neurons.layers)}
    facts |= {"parameters": size.parameters, "multiply-accumulates": size.macs}
    shown = {
        "title": title,
        "facts": {name: f"{value:,}" for name, value in facts.items()},
        "notes": notes,
        "layers": [asdict(layer) for layer in neurons.layers.values()],
        "pinned": {name or "(model)": reason for name, reason in neurons.pinned.items()},
        "metrics": flat(metrics or {}),
        "stages": stages,
        "training": svg(lambda axes: figures.training(axes, rows)) if rows else "",
        "accuracy": accuracy,
    }
    data: dict[str, Any] = {"words": list(words), "accuracy": accuracy and accuracy.per_class}
    if scores is not None and found is not None:
        shown["groups"] = groups_of(found)
        shown["sharing"], shown["kinds"] = figures.sharing_of(found), figures.SHARING
        shown["tree"] = svg(lambda axes: figures.tree(axes, found), height=0.6 + 0.17 * len(task.classes))
        data |= {"classes": list(found.classes), **drawn(found)}
        data |= priced(neurons, scores.tied(neurons)[scores.the_metric(metric)])
    template = files(__package__).joinpath("page.html").read_text()
    environment = import_optional("jinja2", extra="report").Environment(autoescape=True, trim_blocks=True)
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return Report(environment.from_string(template).render(**shown, data=text))


def groups_of(found: Groups) -> list[dict[str, Any]]:
    """Return the largest groups: classes, number of neurons, and how much of every layer they are."""
    listed, counts = [], found.unused.layers
    for names, slice_ in found.largest(LARGEST):
        shares = {layer: int(mask.sum()) / counts[layer] for layer, mask in slice_.masks.items()}
        listed.append({"names": names, "neurons": len(slice_), "shares": shares})
    return listed


def drawn(found: Groups) -> dict[str, Any]:
    """Return the heat maps of the classes, in percent, in the order of the tree: of all layers, and of each."""
    at = [found.classes.index(name) for name in found.order]
    layers = list(found.unused.layers)
    most = max(1, CELLS // len(at) ** 2)
    layers = layers[:: -(-len(layers) // most)]
    maps = {name or "all layers": figures.arranged(found, name) for name in (None, *layers)}
    return {"order": at, "maps": {name: (100 * of).round().int().flatten().tolist() for name, of in maps.items()}}


def priced(neurons: Neurons, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the picker computes with: contributions in 255ths, and the widths and costs of some sizes."""
    layers = [
        {"name": layer, "scores": base64.b64encode((255 * scaled(of)).round().byte().numpy().tobytes()).decode()}
        for layer, of in scores.items()
    ]
    ranking, sizes = by_mean_score(scores), []
    for number in range(BUDGETS):
        share = SMALLEST ** (1 - number / (BUDGETS - 1))
        counts = widths(ranking.layers, share, powers=(1.0, 1.0), steps=neurons.steps(ROUND_TO))
        kept = retention(neurons, neurons.closed(ranking.prefix(counts)))
        sizes.append({"macs": kept.built_mac, "parameters": kept.built_param, "widths": [*counts.values()]})
    return {"layers": layers, "sizes": sizes}


def flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return figures by dotted name, as text; lists are left out.

    >>> flat({"a": {"b": 0.51234, "c": [1]}, "d": "x"})
    {'a.b': '0.5123', 'd': 'x'}
    """
    found: dict[str, str] = {}
    for name, value in plain.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, str | int | float):
            found[prefix + name] = f"{value:.4g}" if isinstance(value, float) else f"{value}"
    return found


def svg(draw: Callable[[Any], Any], *, height: float = 2.6) -> str:
    """Return a figure as SVG, in the colour of the text around it."""
    import_optional("matplotlib", extra="report")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "torchslice"}):
        figure = Figure(figsize=(3.8, min(height, 30)), layout="constrained")
        axes = figure.subplots()
        axes.patch.set_visible(False)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub("<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S).replace(
        "#000000", "currentColor"
    )
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" ', r'\1class="figure" ', text)
    return text.replace("<text ", '<text fill="currentColor" ')
