"""A network of your own, trained by your own loop on your own DataLoader: cut three of its classes out."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchslice as ts


class Net(nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.conv2, self.norm2 = nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48)
        self.head = nn.Linear(48, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [B, 10] of images [B, 1, 8, 8]."""
        x = torch.relu(self.norm1(self.conv1(images)))
        x = torch.max_pool2d(torch.relu(self.norm2(self.conv2(x))), 2)
        return self.head(x.mean((2, 3)))


def main() -> None:
    """Train, slice, cut, save, load."""
    torch.manual_seed(0)
    digits = load_digits()
    samples = TensorDataset(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(samples, [1400, 397])
    loader, test_loader = DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=128)

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(8):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    task = ts.data.task(train=loader, test=test_loader, classes=[f"digit {n}" for n in range(10)])
    neurons = ts.find_neurons(model, task.example, classes=task.classes)
    slices = ts.semantic.class_slices(neurons, task, strategy=ts.semantic.PerClass(0.3))
    tuning = ts.Training(epochs=5, learning_rate=0.01, batch_size=32)
    three = ts.reuse(neurons, task, slices, classes=["digit 1", "digit 4", "digit 7"], training=tuning)
    print(f"whole network, all classes: {ts.accuracy(model, task)}")
    print(f"sub-model, its classes:     {ts.accuracy(three.model, task.restrict(three.classes))}")
    print(f"{ts.judge.cost(model, task.example)} -> {ts.judge.cost(three.model, task.example)}")

    ts.save(three, "three-digits.safetensors")
    again = ts.load("three-digits.safetensors", allow_import=True)  # the class Net must be importable there
    print(again, torch.equal(again.model(task.example), three.model(task.example)))


if __name__ == "__main__":
    main()
