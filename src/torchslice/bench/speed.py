"""What torchslice costs, as ratios measured in one run: each figure beside what it is compared with, taken in turns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..core.find import find_neurons
from ..errors import TorchsliceError
from ..imports import import_optional
from ..modular import SubTasks, attach_gates, class_slices, objective
from ..modular.metrics import cohesion
from ..semantic import Rule, contributions, slices_from
from ..training import choose_placement, cross_entropy
from ..training.fit import trainable
from ..training.objectives import Objective
from ..use.costs import cost, latency_ms
from ..use.extract import extract
from ..use.partial import Partial
from .contribution_costs import BATCH, captum_rows, memory_rows, time_rows
from .experiment import BENCHES, check_scale, manifest, note, table, write_result
from .ratios import cells, compare, in_turns, missing, noise, seconds


@dataclass(frozen=True)
class Settings:
    """One scale of the bench."""

    repeats: int  # turns of everything that takes less than a second
    steps: int  # training steps of each kind
    networks: tuple[str, ...]  # trained with and without gates
    width: float  # of these networks
    batch_size: int
    images: int  # for class slices
    samples: int  # for cohesion
    neurons: int
    contribution_images: int
    captum_images: int  # one layer at a time is slow


SETTINGS = {
    "smoke": Settings(1, 1, ("resnet18",), 0.125, 8, 32, 200, 300, 20, 10),
    "cpu": Settings(6, 7, ("vgg16", "resnet18"), 1.0, 128, 1024, 5000, 4736, 2560, 64),
    "paper": Settings(9, 30, ("vgg16", "resnet18"), 1.0, 128, 10_000, 5000, 4736, 2560, 128),
}


@BENCHES.register("speed")
def speed(
    scale: str,
    *,
    data_dir: str | Path | None = None,
    out: str | Path = "results",
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the ratios; writes speed-SCALE.json and speed-SCALE.md into `out` and returns the JSON. Needs no data."""
    check_scale(scale)
    settings = SETTINGS[scale]
    torch.manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for part in (_against_torch_pruning, _steps, _slices, _cohesion, _sub_model, _contributions):
        for row in part(settings, device):
            rows.append(row)
            note(" | ".join(cells(row)), progress)
    result: dict[str, Any] = {
        "manifest": manifest(f"torchslice bench speed --scale {scale}", asdict(settings)),
        "rows": rows,
    }
    about = result["manifest"]
    headings = ["what", "against", "ratio (quartiles)", "goal"]
    text = [
        "# Speed",
        "",
        f"`{about['command']}`: {about['processor']}, accelerator {about['accelerator'] or 'none'}, "
        f"torch {about['torch']}. Both sides of a ratio are measured in turns in the same run; the median of the "
        "pairwise ratios, with quartiles. Peak memory is that of a fresh process for each side.",
        "",
        table(headings, [cells(row) for row in rows]),
        "",
    ]
    return write_result(Path(out) / f"speed-{scale}", result, "\n".join(text))


def _against_torch_pruning(settings: Settings, device: str) -> list[dict[str, Any]]:
    """find_neurons + extract of half the neurons, checked, against torch-pruning on a copy of the model."""
    try:
        tp = import_optional("torch_pruning", extra="dev")
    except TorchsliceError as error:
        return [missing("find_neurons + extract", str(error), "<= 1")]
    rows = []
    for name in ("resnet18", "densenet121"):
        model, example = models.create(f"torchvision:{name}").eval(), torch.randn(2, 3, 64, 64)

        def ours(model: nn.Module = model, example: Tensor = example) -> None:
            neurons = find_neurons(model, example)
            extract(model, neurons.random(0.5), example, neurons=neurons)

        def theirs(model: nn.Module = model, example: Tensor = example) -> None:
            other = copy.deepcopy(model)
            last = [module for module in other.modules() if isinstance(module, nn.Linear)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importance = tp.importance.RandomImportance()
                tp.pruner.BasePruner(other, example, importance, pruning_ratio=0.5, ignored_layers=last).step()

        pairs = in_turns(settings.repeats, ours, theirs)
        rows.append(compare(f"find_neurons + extract, {name}", "torch-pruning", "<= 1", pairs))
    return rows


def _steps(settings: Settings, device: str) -> list[dict[str, Any]]:
    """Steps of MwT, of sub-task training and of some neurons only, against a standard one; each with its optimizer."""
    placement = choose_placement(device)
    images = torch.randn(settings.batch_size, 3, 32, 32, device=placement.device)
    images = images.contiguous(memory_format=torch.channels_last)
    numbers = torch.arange(settings.batch_size, device=placement.device)

    def step(model: nn.Module, target: Objective, counts: Sequence[int] = (10,)) -> Callable[[], None]:
        model.train()
        optimizer = torch.optim.SGD(trainable(model), lr=1e-3, momentum=0.9, nesterov=True)

        def run() -> None:
            for classes in counts:
                with placement.autocast():
                    loss, _, _ = target(model, images, numbers % classes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return run

    rows = []
    for name in settings.networks:

        def new(name: str = name) -> nn.Module:
            return models.create(name, width=settings.width).to(
                device=placement.device, memory_format=torch.channels_last
            )  # type: ignore[call-overload]

        divided, part = new(), find_neurons(new(), images[:2]).random(0.2, seed=0)
        options: dict[str, Any] = {"samples_per_class": 2, "correct_only": False, "progress": False, "device": device}
        scores = contributions(divided, noise(100), metric="taylor", **options)
        slices = slices_from(scores, Rule("taylor", "budget", share=0.15)).by_class
        sub_tasks = SubTasks(divided, slices, images[:2])
        goal = "<= 1.15" if placement.device.type == "cuda" else "<= 1.08"
        sides = {
            "MwT step": (step(attach_gates(new(), images[:2]), objective()), 1, goal),
            "sub-task step, 15 % of the neurons per class": (
                step(divided, sub_tasks, sub_tasks.sizes),
                len(sub_tasks.sizes),
                "<= 1",
            ),
            "step of 20 % of the neurons": (step(Partial(new(), part, images[:2]), cross_entropy), 1, "< 1"),
        }
        turns = in_turns(settings.steps, *(side for side, _, _ in sides.values()), step(new(), cross_entropy))
        for place, (what, (_, steps, wanted)) in enumerate(sides.items()):
            pairs = [(turn[place] / steps, turn[-1]) for turn in turns]
            about = f"{what}, {name}, batch {settings.batch_size}, {placement.precision}"
            rows.append(compare(about, "standard step", wanted, pairs))
    return rows


def _slices(settings: Settings, device: str) -> list[dict[str, Any]]:
    """Class slices of all classes against one forward pass of the same gated network over the same images."""
    placement = choose_placement(device, "fp32")
    data = noise(settings.images)
    gated = attach_gates(models.create(settings.networks[0], width=settings.width), data.example).eval()
    gated.to(placement.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward() -> None:
        with torch.no_grad(), placement.autocast():
            for images in data.train.images.split(512):
                normal = data.normalise(images.to(placement.device))
                gated(normal.contiguous(memory_format=torch.channels_last))

    def ours() -> None:
        class_slices(gated, data, device=device, precision=placement.precision, progress=False)

    pairs = in_turns(max(1, settings.repeats // 3), ours, forward)
    state = 2 * 8 * len(data.classes) * sum(layer.count for layer in gated.neurons.layers.values()) / 2**20
    what = f"class slices, {settings.networks[0]}, {settings.images} images, {state:.1f} MiB of sums"
    return [compare(what, "one forward pass", "<= 1.1, < 5 MiB", pairs)]


def _cohesion(settings: Settings, device: str) -> list[dict[str, Any]]:
    """Exact cohesion of one class, in seconds."""
    masks = torch.rand(settings.samples, settings.neurons) < 0.5
    pairs = [(seconds(lambda: cohesion(masks)), 1.0) for _ in range(max(1, settings.repeats // 3))]
    return [compare(f"exact cohesion of {settings.samples} x {settings.neurons}", "one second", "<= 2", pairs)]


def _sub_model(settings: Settings, device: str) -> list[dict[str, Any]]:
    """The speed-up of a sub-model with half of every layer at batch 64, against its share of the MACs."""
    where = choose_placement(device).device
    rows = []
    for name in settings.networks:
        model, example = models.create(name, width=settings.width).eval(), torch.randn(2, 3, 32, 32)
        small = extract(model, find_neurons(model, example).random(0.5), example)
        ratio = cost(model, example).macs / cost(small, example).macs
        for network in (model, small):
            network.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]
        pair = {"full": model, "part": small}
        times = latency_ms(pair, example.to(where), batch_sizes=(64,), repeats=settings.repeats)
        full, part = (times[key][64].median_ms / 1000 for key in ("full", "part"))
        what = f"speed-up by half of {name}, batch 64"
        pairs = [(full / part, ratio)]
        rows.append(compare(what, "its MAC ratio", ">= 0.8", pairs, figure="{:.2f}x"))
    return rows


def _contributions(settings: Settings, device: str) -> list[dict[str, Any]]:
    """Time and memory of contributions of all layers to all classes."""
    images, shared = settings.contribution_images, (settings.width, device)
    return [
        *time_rows(max(1, settings.repeats // 3), images, *shared),
        *captum_rows(settings.captum_images, *shared),
        *memory_rows(min(images, 2 * BATCH), *shared),
    ]
