"""What a network has to be adapted to: adversarial samples, corrupted images, damaged weights.

Images are uint8 [n, ch, H, W] on both sides, so that all of it could be kept in files. Strengths are in grey levels
(1/255).
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchslice.data import Images, Task
from torchslice.errors import TorchsliceError
from torchslice.graph.record import evaluating
from torchslice.inputs import device_of
from torchslice.judge import accuracy
from torchslice.registry import unknown

BATCH = 250  # images at a time
PGD_STEPS = 10
NOISE = 50.0  # grey levels, standard deviation
BLUR = 1.5  # pixels, standard deviation
CONTRAST = 0.2  # what is left of the distance of every pixel to the mean of its image

Attack = Callable[[nn.Module, Images, int, int], Images]  # (model, images, epsilon, seed) -> the same samples, attacked


def shifted(name: str, model: nn.Module, images: Images, *, epsilon: int, seed: int = 0) -> Images:
    """Return images as one of ATTACKS (by `epsilon` grey levels, against the model) or CORRUPTIONS changes them."""
    if name in ATTACKS:
        return ATTACKS[name](model, images, epsilon, seed)
    if name in CORRUPTIONS:
        return replace(images, images=CORRUPTIONS[name](images.images, seed))
    raise unknown("shift", name, (*ATTACKS, *CORRUPTIONS))


# -- adversarial samples ------------------------------------------------------------------------------------------
def fgsm(model: nn.Module, images: Images, epsilon: int, seed: int = 0) -> Images:
    """Move every pixel by `epsilon` grey levels, up the loss by the gradient's sign (arXiv 1412.6572, section 4)."""
    return _in_batches(model, images, lambda x, labels: x + epsilon * _sign(model, images, x, labels))


def pgd(model: nn.Module, images: Images, epsilon: int, seed: int = 0) -> Images:
    """Take ten such steps of a quarter of `epsilon`, from a random start, never further than `epsilon` away.

    Projected gradient descent (arXiv 1706.06083, section 2.1).
    """
    generator = torch.Generator().manual_seed(seed)

    def attack(start: Tensor, labels: Tensor) -> Tensor:
        x = start + epsilon * (2 * torch.rand(start.shape, generator=generator) - 1).to(start.device)
        for _ in range(PGD_STEPS):
            x = x.clamp(0, 255)
            x = start + (x + epsilon / 4 * _sign(model, images, x, labels) - start).clamp(-epsilon, epsilon)
        return x

    return _in_batches(model, images, attack)


def toolbox(attack: str, **settings: Any) -> Attack:
    """Return an attack of the Adversarial Robustness Toolbox, which goes as far as it needs to."""
    return lambda model, images, epsilon, seed: _by_toolbox(attack, model, images, **settings)


# Of C & W, the weight is fixed, which takes a fifth of the time and goes further than it needs to.
FIXED: dict[str, Any] = {"binary_search_steps": 1, "initial_const": 10.0, "confidence": 1.0}
ATTACKS: dict[str, Attack] = {
    "fgsm": fgsm,
    "pgd": pgd,
    # over the decision boundary and 2 % further (arXiv 1511.04599); rounding to grey levels takes some samples back
    "deepfool": toolbox("DeepFool", max_iter=10, epsilon=0.02),
    "cw": toolbox("CarliniL2Method", max_iter=10, learning_rate=0.1, **FIXED),  # Carlini & Wagner (arXiv 1608.04644)
}


def _in_batches(model: nn.Module, images: Images, change: Callable[[Tensor, Tensor], Tensor]) -> Images:
    """Change images float [B, ch, H, W] in 0..255, on the model's device."""
    device, made = device_of(model), []
    with evaluating(model):
        for batch, labels in zip(images.images.split(BATCH), images.labels.split(BATCH), strict=True):
            made.append(_grey(change(batch.to(device).float(), labels.to(device))))
    return replace(images, images=torch.cat(made))


def _normalised(images: Images, x: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (images.mean, images.std))
    return (x / 255 - mean) / std


def _sign(model: nn.Module, images: Images, x: Tensor, labels: Tensor) -> Tensor:
    """Return the sign of the gradient of the cross entropy with respect to images float [B, ch, H, W] in 0..255."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(model(_normalised(images, x)), labels, reduction="sum")
        return torch.autograd.grad(loss, x)[0].sign()


def _grey(x: Tensor) -> Tensor:
    """Round to grey levels, uint8 on the CPU."""
    return x.detach().round().clamp(0, 255).to("cpu", torch.uint8)


def _by_toolbox(attack: str, model: nn.Module, images: Images, **settings: Any) -> Images:
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
            return self.model(_normalised(images, 255 * x))

    network, device = Normalised().eval(), device_of(model)
    with torch.no_grad():
        classes = network(images.images[:1].to(device) / 255).shape[1]
    classifier = classification.PyTorchClassifier(
        *(network, nn.CrossEntropyLoss(), tuple(images.images.shape[1:]), classes),
        clip_values=(0, 1),
        device_type="gpu" if device.type == "cuda" else "cpu",
    )
    made = getattr(evasion, attack)(classifier, batch_size=BATCH, verbose=False, **settings)
    return replace(images, images=_grey(255 * torch.from_numpy(made.generate((images.images.float() / 255).numpy()))))


# -- corrupted images ---------------------------------------------------------------------------------------------
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


# -- damaged weights ----------------------------------------------------------------------------------------------
def damaged(model: nn.Module, task: Task, points: float, *, samples: int = 2000, seed: int = 0) -> nn.Module:
    """Return a copy of a model that has lost `points` (in [0, 1]) of its training accuracy to random weights.

    In random order, weights of all layers are replaced by normal values with the mean and deviation of their layer, as
    few as it takes; accuracy is measured on so many training samples.
    """
    task = task.limit(train=samples, seed=seed)
    generator, before = torch.Generator().manual_seed(seed), accuracy(model, task, "train").overall
    rank, drawn = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            weight = parameter.detach().cpu()
            rank[name] = torch.rand(weight.shape, generator=generator)
            drawn[name] = weight.mean() + weight.std() * torch.randn(weight.shape, generator=generator)

    def hurt(fraction: float) -> nn.Module:
        copied = copy.deepcopy(model)
        for name, new in drawn.items():
            weight = copied.get_parameter(name).data
            weight.copy_(torch.where(rank[name] < fraction, new, weight.cpu()))
        return copied

    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        enough = before - accuracy(hurt(middle), task, "train").overall >= points
        low, high = (low, middle) if enough else (middle, high)
    return hurt(high)
