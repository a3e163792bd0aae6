"""One pass over the training images that adds up what metrics read, for all layers, classes and neurons at once.

Shapes: C classes, M neurons of all layers, b images of a batch that count, n samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.record import evaluating
from ..core.taps import Taps
from ..data import Data
from ..data.splits import rank_in_class
from ..training.progress import progress_bar
from .metrics import Term, reads
from .readings import frozen, observe


def sweep(
    model: nn.Module,
    data: Data,
    taps: Taps,
    terms: Sequence[Term],
    *,
    samples_per_class: int,
    correct_only: bool,
    seed: int,
    batch_size: int,
    device: torch.device,
    progress: bool,
) -> tuple[dict[Term, Tensor], Tensor]:
    """Run the first `samples_per_class` right images of every class, in the random order of `seed`, and add up terms.

    The training images of a class are tried in that order until enough of them are classified correctly, so neither
    batch size nor the order of other classes plays a part. Whether an image is right shows in the pass itself. A class
    of which no image is right goes with wrong ones.

    Returns:
        The sums of the terms, {term: float64 [C, M]}, and the samples in them, int64 [n].
    """
    labels, classes = data.train.labels, len(data.classes)
    order = rank_in_class(labels, seed).argsort(stable=True)
    candidates = [order[labels[order] == c] for c in range(classes)]
    waiting, any_will_do = candidates, torch.full((classes,), not correct_only)
    wanted = sum(min(samples_per_class, len(rows)) for rows in waiting)
    baseline = mean_input(data).to(device) if any("contribution" in reads(term) for term in terms) else None
    totals: dict[Term, Tensor] = {}
    samples = torch.zeros(0, dtype=torch.int64)
    with progress_bar(progress, total=math.ceil(wanted / batch_size)) as bar, frozen(model), evaluating(model):
        while True:
            counts = labels[samples].bincount(minlength=classes)
            lacking = (samples_per_class - counts).tolist()
            rows = torch.cat([own[:k] for own, k in zip(waiting, lacking, strict=True)])
            waiting = [own[k:] for own, k in zip(waiting, lacking, strict=True)]
            if len(rows) == 0 and ((counts == 0) & ~any_will_do).any():
                any_will_do |= counts == 0
                waiting = [own if n == 0 else own[:0] for own, n in zip(candidates, counts.tolist(), strict=True)]
                continue
            if len(rows) == 0:
                return {term: total.cpu() for term, total in totals.items()}, samples
            for batch in rows.split(batch_size):
                images, own = data.normalise(data.train.images[batch].to(device)), labels[batch].to(device)
                logits, values = observe(model, taps, images, own, terms, baseline)
                right = (logits.argmax(1) == own) | any_will_do.to(device)[own]  # [B]
                member = F.one_hot(own[right], classes).double().T  # [C, b]
                for term, value in values.items():
                    totals[term] = totals.get(term, 0) + member @ value[right]
                samples = torch.cat([samples, batch[right.cpu()]])
                bar.advance("contributions", f"{len(samples)} of {wanted} images")


def mean_input(data: Data) -> Tensor:
    """Return the mean of all training images, normalised, float32 [1, ch, H, W]."""
    images = data.train.images
    total = torch.stack([part.sum(0, dtype=torch.int64) for part in images.split(1024)]).sum(0)
    return data.normalise((total.double() / len(images))[None])
