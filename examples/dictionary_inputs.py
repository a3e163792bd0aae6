"""A network whose inputs are a dictionary and whose output is one too: pixels and a measured width of digits."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import torchslice as ts


class TwoInputs(nn.Module):
    """Convolutions over the pixels, a linear layer over the measurements, joined before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.AvgPool2d(4))
        self.measured = nn.Sequential(nn.Linear(2, 16), nn.ReLU())
        self.hidden, self.head = nn.Linear(24 * 4 + 16, 32), nn.Linear(32, 10)

    def forward(self, pixels: Tensor, measured: Tensor) -> dict[str, Tensor]:
        """Return {"scores": logits [B, 10]} of pixels [B, 1, 8, 8] and measured [B, 2]."""
        joined = torch.cat([self.image(pixels).flatten(1), self.measured(measured)], 1)
        return {"scores": self.head(torch.relu(self.hidden(joined)))}


def scores(result: dict[str, Tensor]) -> Tensor:
    """Pick the logits from what the network returns."""
    return result["scores"]


def main() -> None:
    """Train, slice and cut the network; every verb takes the dictionary as it is."""
    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    measured = torch.stack([pixels.mean((1, 2, 3)), (pixels > 0.5).float().mean((1, 2, 3))], 1)
    inputs, labels = {"pixels": pixels, "measured": measured}, torch.tensor(digits.target)
    task = ts.data.task((inputs, labels), name="measured digits")

    model = TwoInputs()
    ts.fit(model, task, ts.Training(epochs=6, batch_size=32), output=scores)
    neurons = ts.find_neurons(model, task.example, classes=task.classes, output=scores)
    slices = ts.semantic.class_slices(neurons, task)
    small = ts.extract(neurons, slices["3"] | slices["8"], classes=["3", "8"])
    print(ts.accuracy(small, task.restrict(["3", "8"]), output=scores))


if __name__ == "__main__":
    main()
