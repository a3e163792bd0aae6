"""A small vision transformer cut for some of its classes: what `text` measures, on images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

import torchslice as ts
from torchslice.data import Task

from .experiment import Benchmark, Network
from .text import Dividing, Settings, Tuned, write_page


@dataclass(frozen=True)
class Vit(Tuned):
    """A ViT of `depth` blocks on grey images of `pixels`, in patches of a quarter of that."""

    pixels: int = 28
    depth: int = 4
    channels: int = 96

    def load(self, data_dir: str | Path | None, seed: int) -> Task:
        return Network.load(self, data_dir, seed)

    def create(self, task: Task) -> nn.Module:
        sizes = {"img_size": self.pixels, "patch_size": self.pixels // 4, "embed_dim": self.channels}
        shape = {**sizes, "depth": self.depth, "num_heads": 4, "in_chans": 1}
        return ts.models.create("timm:vit_tiny_patch16_224", num_classes=len(task.classes), **shape)


FASHION = Vit(
    *("fashion-mnist", "vit", 1.0),
    epochs=6,
    train_images=10_000,
    validation_images=1_000,
    batch_size=64,
    learning_rate=1e-3,
    tuning_rate=3e-4,
    sizes=(2, 3, 5),
    mac_retention=0.5,
)
DIGITS = Vit("digits", "vit", 1.0, epochs=2, subtask_epochs=1, pixels=8, depth=2, channels=16, mac_retention=0.7)
SETTINGS = {
    "smoke": Settings((DIGITS,), 1, samples_per_class=8, sub_tasks=1),
    "cpu": Settings((FASHION,), samples_per_class=64, sub_tasks=3),
    "paper": Settings((replace(FASHION, train_images=None, epochs=60, subtask_epochs=30),), sub_tasks=3),
}
BENCHMARK = Benchmark("vit", SETTINGS, Dividing, write_page)
