"""torchslice train: three methods, resumes and continues, refuses what is not its own, leaves nothing when it fails."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from torchslice.runs import Run
from torchslice.training.checkpoint import Checkpoint

from .conftest import TRAIN, neurons_of


@contextmanager
def interrupted_after(epochs: int):
    """Interrupt training after so many saved epochs."""
    save, left = Checkpoint.save, iter(range(epochs - 1, -1, -1))

    def save_then_interrupt(self, *state):
        save(self, *state)
        if next(left) == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_then_interrupt)
        yield


def same_weights(one, other):
    states = [neurons_of(folder)[0] for folder in (one, other)]
    one, other = (getattr(state, "model", state).state_dict() for state in states)
    return all(tensor.equal(other[name]) for name, tensor in one.items())


def test_train_says_its_plan_and_gives_its_history(torchslice, tmp_path):
    out = tmp_path / "run"
    result = torchslice(*TRAIN, "--method", "standard", "--out", out, "--train-limit", 100, "--epochs", 1, "--json")
    assert [row["epoch"] for row in result.json["history"]] == [1] and result.json["resumed_after"] == 0
    for part in ("convnet", "4,838 parameters", "train: 100 ", "1 epochs of 64", str(out)):
        assert part in result.err
    assert json.loads((out / "run.json").read_text())["recipe"]["train_limit"] == 100
    assert sorted(path.name for path in out.iterdir()) == ["run.json", "training"]


@pytest.mark.parametrize("method", ["standard", "gates"])
def test_an_interrupted_training_goes_on_to_the_same_weights(torchslice, request, method, tmp_path):
    whole, out = request.getfixturevalue(method), tmp_path / "run"
    arguments = (*TRAIN, "--method", method, "--out", out)
    with interrupted_after(1):
        result = torchslice(*arguments)
    assert result.code == 130 and not result.out
    assert "first 1 of 2 epochs" in result.err.splitlines()[-1] and "resumes" in result.err.splitlines()[-1]
    torchslice("slice", out).refused("1 of 2 epochs", "torchslice train")
    torchslice(*arguments, "--epochs", 3).refused("--epochs was 2, now 3", "finished run can be continued")
    result = torchslice(*arguments)
    assert result.code == 0 and "1 epochs are done; going on" in result.err
    assert same_weights(out, whole)


def test_sub_task_training_resumes_in_its_second_part(torchslice, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    arguments = [*TRAIN, "--epochs", 4, "--out"]
    assert [row["epoch"] for row in torchslice(*arguments, whole, "--json").json["history"]] == [1, 2, 3, 4]
    with interrupted_after(3):
        assert torchslice(*arguments, out).code == 130
    torchslice("slice", out).refused("3 of 4 epochs", "torchslice train")
    assert "3 epochs are done; going on" in torchslice(*arguments, out).err
    assert same_weights(out, whole)


@pytest.mark.parametrize("method", ["standard", "gates", "subtasks"])
def test_more_epochs_continue_a_finished_run(torchslice, request, method, copy_of):
    out = copy_of(request.getfixturevalue(method))
    arguments = [*TRAIN, "--method", method, "--out", out]
    result = torchslice(*arguments, "--epochs", 3, "--json")
    assert [row["epoch"] for row in result.json["history"]] == [1, 2, 3] and result.json["resumed_after"] == 2
    assert Run.open(out).recipe.training.epochs == 3 and Run.open(out).epochs_done == 3
    torchslice(*arguments).refused("--epochs was 3, now 2", "another folder")


def test_a_finished_training_is_left_alone(torchslice, standard):
    before = {path: path.read_bytes() for path in standard.rglob("*") if path.is_file()}
    result = torchslice(*TRAIN, "--method", "standard", "--out", standard)
    assert result.code == 0 and "nothing is left to do" in result.err
    assert before == {path: path.read_bytes() for path in standard.rglob("*") if path.is_file()}


def test_a_network_and_data_of_ones_own(torchslice, own, tmp_path):
    (tmp_path / "netsofatest.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, num_classes, width=8):\n"
        "        super().__init__()\n"
        "        self.hidden, self.head = torch.nn.Linear(64, width), torch.nn.Linear(width, num_classes)\n"
        "    def forward(self, images):\n"
        "        return self.head(torch.relu(self.hidden(images.flatten(1))))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.setattr("sys.dont_write_bytecode", True)
        options = ("--data-option", "names=01278", "--method", "standard", "--epochs", 2, "--device", "cpu")
        run, out = tmp_path / "run", tmp_path / "pair.safetensors"
        assert torchslice("train", "netsofatest:Net", f"{own}:load", *options, "--out", run).code == 0
        found = torchslice("extract", run, "--classes", "0,1", "--slices", tmp_path / "s.json", "--out", out)
        found.refused("no file", "s.json")
        assert torchslice("slice", run, "--device", "cpu").code == 0
        result = torchslice("extract", run, "--classes", "7,1", "--out", out, "--device", "cpu")
        (line,) = [line for line in result.out.splitlines() if line.startswith("Next:")]
        words = line.split()[2:]
        assert words == ["evaluate", str(out), f"{own}:load", "--data-option", "names=01278", "--allow-import"]
        torchslice(*words[:-1]).refused("netsofatest", "--allow-import")
        assert [*torchslice(*words, "--json").json["class_accuracy"]] == ["1", "7"]


def test_two_processes_of_torchrun_draw_and_lose_what_one_does(tmp_path):
    words = ["train", "lenet", "digits", "--epochs", 4, "--batch-size", 64, "--train-limit", 512]
    words += ["--precision", "fp32", "--device", "cpu", "--out"]
    (tmp_path / "train.py").write_text("from torchslice.cli import main; raise SystemExit(main())")
    rows = []
    for count in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        command = [*launcher, tmp_path / "train.py", *words, tmp_path / str(count)]
        subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=300)
        logs = [(tmp_path / str(count) / part / "metrics.jsonl").read_text() for part in ("training", "subtasks")]
        rows.append([json.loads(line) for log in logs for line in log.splitlines()])
    losses = [[row["loss"] for row in some] for some in rows]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert Run.open(tmp_path / "1").rankings() == Run.open(tmp_path / "2").rankings()
