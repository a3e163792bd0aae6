"""Running means over the samples of an epoch, and a bar that stays out of the way."""

from __future__ import annotations

import torch

from torchslice.training.progress import RunningMeans, progress_bar


def test_means_are_weighted_by_samples():
    means = RunningMeans()
    means.add(1, loss=torch.tensor(4.0), part=torch.tensor(1.0))
    means.add(3, loss=torch.tensor(0.0, requires_grad=True), part=torch.tensor(1.0))
    assert means.read() == {"loss": 1.0, "part": 1.0}


def test_a_bar_that_is_not_shown_prints_nothing(capsys):
    with progress_bar(False, total=3) as bar:
        bar("title")
    assert capsys.readouterr() == ("", "")


def test_a_bar_goes_on_where_a_run_was_interrupted(capsys):
    with progress_bar(True, total=4, done=2) as bar:
        bar("epoch 2", "loss 0.5")
        bar("epoch 2")
    out, err = capsys.readouterr()
    assert not out and "epoch 2" in err and "loss 0.5" in err
