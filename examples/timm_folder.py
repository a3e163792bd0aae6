"""A network of timm and a folder of image files, read from disk: python timm_folder.py DIR (one folder per class)."""

import sys
from pathlib import Path

import torch

import torchslice as ts


def main(folder: Path) -> None:
    """Train a small timm network on the folder, then cut the sub-model of its first two classes out."""
    torch.manual_seed(0)
    task = ts.data.load(f"folder:{folder}", image_size=32, workers=0)
    model = ts.models.create("timm:test_resnet", num_classes=len(task.classes))
    ts.fit(model, task, ts.Training(epochs=2, batch_size=64, learning_rate=0.02))
    neurons = ts.find_neurons(model, task.example, classes=task.classes)
    print(neurons)
    slices = ts.semantic.class_slices(neurons, task)
    tuning = ts.Training(epochs=2, learning_rate=0.01)
    pair = ts.reuse(neurons, task, slices, classes=task.classes[:2], training=tuning)
    print(f"{pair.classes}: {ts.accuracy(pair.model, task.restrict(pair.classes))}")
    ts.save(pair, folder.parent / "pair.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
