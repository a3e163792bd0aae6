"""What contributions cost in time and in memory, beside a plain forward and backward pass and beside captum."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..core.find import find_neurons
from ..errors import TorchsliceError
from ..imports import import_optional
from ..semantic import contributions
from ..training import choose_placement
from .ratios import compare, in_turns, missing, noise

BATCH = 128  # images per pass, on both sides
FOUR = ("avg", "var", "ens", "taylor")
STATUS = Path("/proc/self/status")


class Work:
    """What is compared: passes over random images of 32x32 through a ResNet18."""

    def __init__(self, width: float, images: int, device: str) -> None:
        self.place = choose_placement(device, "fp32").device
        self.data = noise(images)
        self.model = models.create("resnet18", width=width).to(self.place).eval()
        neurons = find_neurons(self.model, self.data.example.to(self.place))
        self.layers = [self.model.get_submodule(name) for name in neurons.layers]

    def plain(self) -> None:
        """One forward and backward pass over the images."""
        split = self.data.train
        for images, labels in zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True):
            logits = self.model(self.data.normalise(images.to(self.place)))
            nn.functional.cross_entropy(logits, labels.to(self.place)).backward()
        self.model.zero_grad()

    def ours(self, *metrics: str) -> None:
        """Contributions of all layers to all classes."""
        contributions(
            self.model,
            self.data,
            metric=metrics,
            samples_per_class=len(self.data.train),
            correct_only=False,
            batch_size=BATCH,
            device=self.place,
            progress=False,
        )

    def captums(self, method: Any, *, at_once: bool) -> None:
        """The same by a method of captum, without the means: of a list of layers, or of one after the other."""
        split = self.data.train
        base = self.data.normalise(split.images.to(self.place)).mean(0, keepdim=True)
        for images, labels in zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True):
            x, target = self.data.normalise(images.to(self.place)), labels.to(self.place)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # captum says that it sets hooks
                if at_once:
                    method(self.model, self.layers).attribute(x, target=target)
                else:
                    for layer in self.layers:
                        method(self.model, layer).attribute(x, base.expand_as(x), target=target)


def time_rows(repeats: int, images: int, width: float, device: str) -> list[dict[str, Any]]:
    """Contributions against a plain pass over the same images."""
    work = Work(width, images, device)
    turns = in_turns(repeats, work.plain, partial(work.ours, *FOUR), partial(work.ours, "deeplift"))
    of, plain = f"of resnet18, {images} images", "forward and backward pass"
    return [
        compare(f"{', '.join(FOUR)} {of}", plain, "<= 1.15", [(four, passed) for passed, four, _ in turns]),
        compare(f"deeplift {of}", plain, "<= 3", [(deeplift, passed) for passed, _, deeplift in turns]),
    ]


def captum_rows(images: int, width: float, device: str) -> list[dict[str, Any]]:
    """Contributions against captum, whose DeepLIFT takes one layer at a time, and functions by their gradient."""
    work = Work(width, images, device)
    of, layers = f"of resnet18, {images} images", f"{len(work.layers)} layers"
    try:
        attr = import_optional("captum.attr", extra="dev")
    except TorchsliceError as error:
        return [missing(f"taylor, deeplift {of}", f"captum: {error}", "none")]
    rows = []
    for metric, theirs, method, at_once in (
        ("taylor", f"gradient x activation, list of {layers}", attr.LayerGradientXActivation, True),
        ("deeplift", f"LayerDeepLift, {layers} one by one, relu by its gradient", attr.LayerDeepLift, False),
    ):
        turns = in_turns(1, partial(work.ours, metric), partial(work.captums, method, at_once=at_once))
        rows.append(compare(f"{metric} {of}", f"captum, {theirs}", "none", turns))
    return rows


def memory_rows(images: int, width: float, device: str) -> list[dict[str, Any]]:
    """Peak memory of contributions against that of a plain pass, each in a process of its own."""
    if not STATUS.is_file():
        return [missing("peak memory of contributions", f"not measured: this system has no {STATUS}", "<= 1.2")]
    idle, peak = peak_memory((), images, width, device)
    rows = []
    for metrics in (FOUR, ("deeplift",)):
        own_idle, own_peak = peak_memory(metrics, images, width, device)
        what = f"peak memory of {', '.join(metrics)} of resnet18, batch {min(images, BATCH)}"
        for which, pair in (("whole process", (own_peak, peak)), ("above idle", (own_peak - own_idle, peak - idle))):
            text = f"forward and backward pass, {which}"
            rows.append(compare(f"{what}, {which}", text, "<= 1.2", [pair], figure="{:.0f} MiB"))
    return rows


def peak_memory(metrics: tuple[str, ...], images: int, width: float, device: str) -> tuple[float, float]:
    """Run contributions, or a plain pass for no metrics, in a fresh process: its memory before and at most, in MiB."""
    code = f"from {__name__} import report_memory; report_memory({metrics!r}, {images}, {width}, {device!r})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    idle, peak = json.loads(done.stdout)
    return idle, peak


def report_memory(metrics: tuple[str, ...], images: int, width: float, device: str) -> None:
    """Do the work of `peak_memory` in this process and print what it needs."""
    work = Work(width, images, device)
    idle, _ = memory_mib(work.place)
    work.ours(*metrics) if metrics else work.plain()
    print(json.dumps([idle, memory_mib(work.place)[1]]))


def memory_mib(place: torch.device) -> tuple[float, float]:
    """Return the memory of this process now and at its peak, in MiB; on a GPU, that of its tensors."""
    if place.type == "cuda":
        return torch.cuda.memory_allocated(place) / 2**20, torch.cuda.max_memory_allocated(place) / 2**20
    now, peak = (re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text()) for key in ("VmRSS", "VmHWM"))
    assert now and peak
    return int(now[1]) / 1024, int(peak[1]) / 1024
