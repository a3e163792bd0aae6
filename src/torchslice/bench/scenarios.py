"""What a network has to be adapted to: adversarial samples, corrupted images, damaged weights.

Images are uint8 [n, ch, H, W] on both sides, so that all of it could be kept in files. Strengths are in grey levels
(1/255).
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.record import evaluating
from ..data import Data, Split
from ..errors import TorchsliceError
from ..registry import unknown
from ..use.evaluate import accuracy, device_of

BATCH = 250  # images at a time
PGD_STEPS = 10
NOISE = 50.0  # grey levels, standard deviation
BLUR = 1.5  # pixels, standard deviation
CONTRAST = 0.2  # what is left of the distance of every pixel to the mean of its image


def shifted(name: str, model: nn.Module, data: Data, split: Split, *, epsilon: int, seed: int = 0) -> Split:
    """Return the samples of a split as one of ATTACKS (by `epsilon` grey levels) or CORRUPTIONS changes them.

    >>> shifted("fgsm", model, data, data.test, epsilon=8)
    """
    if name in ATTACKS:
        return ATTACKS[name](model, data, split, epsilon, seed)
    if name in CORRUPTIONS:
        return Split(CORRUPTIONS[name](split.images, seed), split.labels)
    raise unknown("shift", name, (*ATTACKS, *CORRUPTIONS))


# -- adversarial samples ----------------------------------------------------------------------------------------
def fgsm(model: nn.Module, data: Data, split: Split, epsilon: int, seed: int = 0) -> Split:
    """Move every pixel by `epsilon` grey levels, up the loss by the gradient's sign (arXiv 1412.6572, section 4)."""
    return _in_batches(model, split, lambda x, labels: x + epsilon * _sign(model, data, x, labels))


def pgd(model: nn.Module, data: Data, split: Split, epsilon: int, seed: int = 0) -> Split:
    """Take ten such steps of a quarter of `epsilon`, from a random start, never further than `epsilon` away.

    Projected gradient descent (arXiv 1706.06083, section 2.1).
    """
    generator = torch.Generator().manual_seed(seed)

    def attack(start: Tensor, labels: Tensor) -> Tensor:
        x = start + epsilon * (2 * torch.rand(start.shape, generator=generator) - 1).to(start.device)
        for _ in range(PGD_STEPS):
            x = x.clamp(0, 255)
            x = start + (x + epsilon / 4 * _sign(model, data, x, labels) - start).clamp(-epsilon, epsilon)
        return x

    return _in_batches(model, split, attack)


def deepfool(model: nn.Module, data: Data, split: Split, epsilon: int = 0, seed: int = 0) -> Split:
    """Go the shortest way over the decision boundary (arXiv 1511.04599) and 2 % further, as there.

    By the Adversarial Robustness Toolbox. Rounding to grey levels takes some samples back.
    """
    return _by_toolbox("DeepFool", model, data, split, max_iter=10, epsilon=0.02)


def carlini_wagner(model: nn.Module, data: Data, split: Split, epsilon: int = 0, seed: int = 0) -> Split:
    """Attack with the L2 loss of Carlini & Wagner (arXiv 1608.04644), by the Adversarial Robustness Toolbox.

    The weight of the attack is fixed, which takes a fifth of the time and goes further than it needs to.
    """
    weight = {"binary_search_steps": 1, "initial_const": 10.0, "confidence": 1.0}
    return _by_toolbox("CarliniL2Method", model, data, split, max_iter=10, learning_rate=0.1, **weight)


#: name -> function (model, data, split, epsilon, seed) -> the same samples, attacked
ATTACKS: dict[str, Callable[[nn.Module, Data, Split, int, int], Split]] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "deepfool": deepfool,
    "cw": carlini_wagner,
}


def _in_batches(model: nn.Module, split: Split, change: Callable[[Tensor, Tensor], Tensor]) -> Split:
    """Change images float [B, ch, H, W] in 0..255, on the model's device."""
    device, made = device_of(model), []
    with evaluating(model):
        for images, labels in zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True):
            made.append(_grey(change(images.to(device).float(), labels.to(device))))
    return Split(torch.cat(made), split.labels)


def _normalised(data: Data, x: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (data.mean, data.std))
    return (x / 255 - mean) / std


def _sign(model: nn.Module, data: Data, x: Tensor, labels: Tensor) -> Tensor:
    """Return the sign of the gradient of the cross entropy with respect to images float [B, ch, H, W] in 0..255."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(model(_normalised(data, x)), labels, reduction="sum")
        return torch.autograd.grad(loss, x)[0].sign()


def _grey(x: Tensor) -> Tensor:
    """Round to grey levels, uint8 on the CPU."""
    return x.detach().round().clamp(0, 255).to("cpu", torch.uint8)


def _by_toolbox(attack: str, model: nn.Module, data: Data, split: Split, **settings: Any) -> Split:
    try:
        evasion = importlib.import_module("art.attacks.evasion")
        classification = importlib.import_module("art.estimators.classification")
    except ImportError as error:
        raise TorchsliceError(
            f"{attack} comes from the Adversarial Robustness Toolbox, which is not installed; "
            "install it with: pip install adversarial-robustness-toolbox"
        ) from error

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(_normalised(data, 255 * x))

    device = "gpu" if device_of(model).type == "cuda" else "cpu"
    shape = tuple(split.images.shape[1:])
    classifier = classification.PyTorchClassifier(
        Normalised().eval(), nn.CrossEntropyLoss(), shape, len(data.classes), clip_values=(0, 1), device_type=device
    )
    made = getattr(evasion, attack)(classifier, batch_size=BATCH, verbose=False, **settings)
    return Split(_grey(255 * torch.from_numpy(made.generate((split.images.float() / 255).numpy()))), split.labels)


# -- corrupted images -------------------------------------------------------------------------------------------
def noise(images: Tensor, seed: int = 0) -> Tensor:
    """Add Gaussian noise of NOISE grey levels."""
    return _grey(images + NOISE * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)))


def blur(images: Tensor, seed: int = 0) -> Tensor:
    """Blur with a Gaussian of BLUR pixels; edges are continued outwards."""
    reach = round(3 * BLUR)
    bell = torch.exp(-((torch.arange(-reach, reach + 1) / BLUR) ** 2) / 2)
    bell = bell / bell.sum()
    x = F.pad(images.float().flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")  # [n * ch, 1, H + .., W + ..]
    return _grey(F.conv2d(F.conv2d(x, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1)).reshape(images.shape))


def contrast(images: Tensor, seed: int = 0) -> Tensor:
    """Bring every pixel so near to the mean of its image that CONTRAST of its distance is left."""
    mean = images.float().mean((1, 2, 3), keepdim=True)
    return _grey(mean + CONTRAST * (images - mean))


#: name -> function (images, seed) -> images
CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {"noise": noise, "blur": blur, "contrast": contrast}


# -- damaged weights --------------------------------------------------------------------------------------------
def damaged(model: nn.Module, data: Data, points: float, *, images: int = 2000, seed: int = 0) -> nn.Module:
    """Return a copy of a model that has lost `points` (in [0, 1]) of its training accuracy to random weights.

    In random order, weights of all layers are replaced by normal values with the mean and deviation of their layer, as
    few as it takes; accuracy is measured on `images` training images.
    """
    task = data.limit(train=images, seed=seed)
    weights = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    generator = torch.Generator().manual_seed(seed)
    rank, drawn = {}, {}
    for name in weights:
        weight = model.get_parameter(name).detach().cpu()
        rank[name] = torch.rand(weight.shape, generator=generator)
        drawn[name] = weight.mean() + weight.std() * torch.randn(weight.shape, generator=generator)
    before = accuracy(model, task, split="train").overall

    def hurt(share: float) -> nn.Module:
        copied = copy.deepcopy(model)
        for name in weights:
            weight = copied.get_parameter(name).data
            weight.copy_(torch.where(rank[name] < share, drawn[name], weight.cpu()))
        return copied

    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        enough = before - accuracy(hurt(middle), task, split="train").overall >= points
        low, high = (low, middle) if enough else (middle, high)
    return hurt(high)
