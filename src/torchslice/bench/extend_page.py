"""The page of `bench extend`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .experiment import by_network, machine, spread, table
from .pictures import Curve, draw

#: what is measured of every arm, all on test images
FIGURES = {
    "known": "known classes, task given",
    "new": "new classes, task given",
    "all": "all classes, task not given",
    "all_known": "known classes, task not given",
    "all_new": "new classes, task not given",
}
ARMS = {
    "ours": "the critical neurons settle on the known classes, the others learn the new ones; scores simply joined",
    "ours, bias": "the same; rule and bias between known and new scores chosen on validation images of both",
    "ours, replay": "the same, trained with some images of the known classes as well (see settings)",
    "control: random slice": "as ours, with a random slice that has as many neurons in every layer",
    "control: random slice, replay": "as ours, replay, with the random slice",
    "ours, slice as found": "as ours, but the slice does not settle first",
    "naive": "all weights learn the new classes",
    "replay 5%": "all weights learn the new classes and 5 % of the images of the known ones",
    "replay 10%": "likewise, 10 %",
    "replay 100%": "likewise, all of them",
    "EWC": "all weights learn the new classes, held where they matter to the known ones",
    "LwF": "all weights learn the new classes, the known scores are kept on their images",
    "DeepArc": "the redundant layers learn the new classes",
    "upper bound: joint": "one network trained on all classes from scratch, as many epochs as the first",
    "scratch": "a network of its own for the new classes, trained as long as the first",
}


def page(result: dict[str, Any], path: Path) -> str:
    """Write three tables per network: the arms, what the choice of critical neurons does, and the chain of tasks."""
    about, settings = result["manifest"], result["manifest"]["settings"]
    lines = [
        "# Extending a network by new classes",
        "",
        f"`{about['command']}`: {settings['seeds']} seeds; {machine(about)}.",
        "",
        f"A network learns the first {settings['known']} classes, then the others. Test accuracy in percent, mean ± "
        "standard deviation over the seeds: of known and new classes where it is given which of both an image shows, "
        "then of all classes where it is not, and the two halves of that. All trainings are equally long "
        f"(settling: {settings['settle_epochs']} epochs more). Share and metric of the critical neurons, whether the "
        "others start anew, and the learning rates of all that train the whole network or DeepArc's layers and the "
        "weights of EWC and LwF are chosen by validation accuracy. *kept* is known accuracy "
        "after extending over that of what answered before, the slice or the whole network.",
        "",
        _identical(result["runs"]),
        "",
        _picture(result, path),
    ]
    for name, runs in by_network(result["runs"]).items():
        whole = spread([run["whole"] for run in runs])
        chosen = "; ".join(_choice(run["chosen"]) for run in runs)
        images = f"{runs[0]['train_images']:,} training images, {runs[0]['epochs']} epochs"
        lines += ["", f"## {name}", "", f"{images}. Known classes before: {whole}. Critical: {chosen}."]
        lines += ["", _arms(runs), "", _variants(runs), "", _chain(runs)]
    lines += ["", *(f"- **{arm}**: {meaning}." for arm, meaning in ARMS.items()), ""]
    return "\n".join(lines)


def _picture(result: dict[str, Any], path: Path) -> str:
    """Draw how accuracy goes on as tasks are added until no neuron is left."""
    panels: dict[str, dict[str, list[Curve]]] = {}
    for network, runs in by_network(result["runs"]).items():
        means = [[100 * statistics.fmean(step["tasks"]) for step in run["chain"]] for run in runs]
        chains: list[Curve] = [list(enumerate(values, start=1)) for values in means]
        panels.setdefault("a chain of small tasks", {})[network] = chains
    title = "Accuracy on all tasks so far, each through its slice; mean ± deviation over the seeds"
    return draw(path.with_suffix(".png"), panels, x="tasks learned", y="test accuracy, task given, %", title=title)


def _identical(runs: Sequence[dict[str, Any]]) -> str:
    """Say for how many slices the scores of the known classes did not change at all."""
    found = [arm["identical"] for run in runs for arm in run["arms"].values() if "identical" in arm]
    return (
        f"Through their slice, the known classes' scores on all test images are bit for bit what they were before "
        f"extending in {sum(map(int, found))} of {len(found)} cases."
    )


def _arms(runs: Sequence[dict[str, Any]]) -> str:
    figures = list(FIGURES)
    rows = []
    for arm in ARMS:
        cells = [spread([run["arms"][arm].get(figure) for run in runs]) for figure in figures]
        kept = [run["arms"][arm].get("kept") for run in runs]
        rows.append([arm, *cells[:1], spread(kept), *cells[1:]])
    headings = ["", "known", "kept", "new", "all, not given", "known, not given", "new, not given"]
    return table(headings, rows)


def _choice(variant: dict[str, Any]) -> str:
    return f"{variant['share']:.0%} by {variant['metric']}, others {'anew' if variant['restart'] else 'kept'}"


def _variants(runs: Sequence[dict[str, Any]]) -> str:
    """Write what the metric and the share of critical neurons do."""
    figures = ("found", "settled", "known", "new")
    rows = []
    for number, variant in enumerate(runs[0]["variants"]):
        cells = [spread([run["variants"][number][figure] for run in runs]) for figure in figures]
        rows.append([_choice(variant), *cells])
    return table(["critical neurons", "slice as found", "settled", "known, after extending", "new"], rows)


def _chain(runs: Sequence[dict[str, Any]]) -> str:
    """Write the chain: a row per task, accuracies of all tasks so far through their slices."""
    tasks = max(len(run["chain"]) for run in runs)
    rows = []
    for number in range(tasks):
        steps = [run["chain"][number] for run in runs if len(run["chain"]) > number]
        cells = [spread([step["tasks"][i] for step in steps]) if i <= number else "" for i in range(tasks)]
        used = spread([step["neuron_retention"] for step in steps])
        rows.append([", ".join(steps[0]["classes"]), used, spread([step["learned"] for step in steps]), *cells])
    headings = ["chain: task", "neurons in use", "learned", *(f"task {i + 1}" for i in range(tasks))]
    return table(headings, rows)
