"""Resuming is bit-equal to never stopping, whatever is kept; and a damaged or foreign checkpoint is named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.nets import assert_equal, state, tiny_net, tiny_task
from torchslice.errors import TorchsliceError
from torchslice.files import digest_of, locked
from torchslice.training import CrossEntropy, Training, accuracy, finetune, fit
from torchslice.training.checkpoint import BEST, FILE, METRICS, read_checkpoint

QUIET = Training(epochs=3, batch_size=8, device="cpu", precision="fp32", progress=False)


class Interrupted(CrossEntropy):
    """What is minimised by default, interrupted by Ctrl-C in the second step after some epochs of three steps."""

    def __init__(self, epochs: int) -> None:
        super().__init__(QUIET.label_smoothing)
        object.__setattr__(self, "calls", iter(range(10**6)))
        object.__setattr__(self, "last", 3 * epochs + 1)

    def __call__(self, model, inputs, labels):
        if next(self.calls) == self.last:
            raise KeyboardInterrupt
        return super().__call__(model, inputs, labels)

    def __repr__(self) -> str:
        return repr(CrossEntropy(self.label_smoothing))


def figures(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


SETTINGS = {
    "sgd": {},
    "bf16": {"precision": "bf16"},
    "adamw with warm-up and decay": {
        "optimizer": "adamw",
        "warmup_fraction": 0.5,
        "weight_decay": 0.1,
        "learning_rate": 0.01,
    },
}


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_resuming_is_bit_equal_to_never_stopping(tmp_path, kind, stop, keep):
    task, training = tiny_task(), replace(QUIET, **SETTINGS[kind])
    whole = tiny_net(dropout=0.5)
    rows = fit(whole, task, training, keep=keep)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(tiny_net(dropout=0.5), task, training, objective=Interrupted(stop), folder=tmp_path / "run", keep=keep)
    assert f"the first {stop} of 3 epochs are in" in caught.value.__notes__[0]
    resumed = tiny_net(dropout=0.5, seed=1 if stop else 0)  # other weights, replaced by those of the checkpoint
    torch.manual_seed(99)
    resumed_rows = fit(resumed, task, training, folder=tmp_path / "run", keep=keep)
    assert_equal(state(whole), state(resumed))
    assert figures(rows) == figures(resumed_rows)


@pytest.mark.parametrize("stop", [1, 2])
def test_fine_tuning_resumes_with_its_best_epoch(tmp_path, stop):
    task, training = tiny_task(), replace(QUIET, epochs=4, learning_rate=0.3)
    scores = [0.2, 0.9, 0.5, 0.9, 0.3]

    def looking(start):
        found = iter(scores[start:])
        return lambda network: {"validation_accuracy": next(found)}

    whole = finetune(tiny_net(), task, training, look=looking(0))
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_net(), task, training, objective=Interrupted(stop), folder=tmp_path, look=looking(0))
    resumed = finetune(tiny_net(), task, training, folder=tmp_path, look=looking(stop + 1))
    assert resumed.kept == whole.kept == 3
    assert figures(resumed.log) == figures(whole.log)
    assert_equal(state(resumed.model), state(whole.model))


def test_epoch_0_is_kept_on_disk_too(tmp_path):
    def look(network):
        return {"validation_accuracy": 0.9 if network[0].weight.equal(start) else 0.1}

    given = tiny_net()
    start = given[0].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        finetune(given, tiny_task(), QUIET, objective=Interrupted(2), folder=tmp_path, look=look)
    resumed = finetune(tiny_net(seed=1), tiny_task(), QUIET, folder=tmp_path, look=look)
    assert resumed.kept == 0
    assert_equal(state(resumed.model), state(given))


def test_a_best_epoch_that_is_gone_is_noticed(tmp_path):
    fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path, keep="best")
    (tmp_path / BEST).unlink()
    with pytest.raises(TorchsliceError, match=BEST):
        fit(tiny_net(seed=1), tiny_task(), QUIET, folder=tmp_path, keep="best")


def test_a_finished_run_is_loaded_and_its_metrics_are_readable(tmp_path):
    task, model, again = tiny_task(), tiny_net(), tiny_net(seed=1)
    rows = fit(model, task, QUIET, folder=tmp_path)
    assert fit(again, task, QUIET, folder=tmp_path) == rows
    assert_equal(state(model), state(again))
    assert [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()] == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, METRICS]


def test_a_finished_run_that_kept_its_best_epoch_is_loaded(tmp_path):
    task, training = tiny_task(), replace(QUIET, learning_rate=3.0)
    model, again = tiny_net(), tiny_net(seed=1)
    rows = fit(model, task, training, folder=tmp_path, keep="best")
    assert fit(again, task, training, folder=tmp_path, keep="best") == rows
    assert_equal(state(model), state(again))
    assert accuracy(again, task, "validation").overall == max(row["validation_accuracy"] for row in rows)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_more_epochs_continue_a_finished_run_with_a_new_schedule(tmp_path, keep):
    task = tiny_task()
    first = fit(tiny_net(), task, replace(QUIET, epochs=2), folder=tmp_path, keep=keep)
    more = tiny_net(seed=1)
    rows = fit(more, task, replace(QUIET, epochs=5), folder=tmp_path, keep=keep)
    assert rows[: len(first)] == first and [row["epoch"] for row in rows][-5:] == [1, 2, 3, 4, 5]
    rates = [row["learning_rate"] for row in rows[-5:]]
    assert rates[2:] == pytest.approx([Training(epochs=3).rate(3 * epoch, 3) for epoch in range(3)])
    again = tiny_net(seed=2)
    assert fit(again, task, replace(QUIET, epochs=5), folder=tmp_path, keep=keep) == rows
    assert_equal(state(again), state(more))


def test_a_continued_run_is_interrupted_and_resumed_to_the_bit(tmp_path):
    task, training = tiny_task(), replace(QUIET, epochs=4)
    for folder in ("one", "two"):
        fit(tiny_net(), task, replace(training, epochs=2), folder=tmp_path / folder)
    whole, resumed = tiny_net(seed=1), tiny_net(seed=2)
    rows = fit(whole, task, training, folder=tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(seed=3), task, training, objective=Interrupted(1), folder=tmp_path / "two")
    assert figures(fit(resumed, task, training, folder=tmp_path / "two")) == figures(rows)
    assert_equal(state(whole), state(resumed))


def test_other_arguments_do_not_resume(tmp_path):
    task = tiny_task()
    once = replace(QUIET, epochs=1)
    fit(tiny_net(), task, once, folder=tmp_path)
    model = tiny_net(seed=1)
    before = state(model)

    def refused(text, model=model, task=task, training=once, **options):
        with pytest.raises(TorchsliceError, match=text):
            fit(model, task, training, folder=tmp_path, **options)

    refused(
        "epochs was 1, now 2; learning_rate was 0.1, now 0.2.*another folder",
        training=replace(once, epochs=2, learning_rate=0.2),
    )
    refused("objective was", objective=lambda *arguments: CrossEntropy()(*arguments))
    refused("task was", task=tiny_task(30))
    refused("keep was 'last', now 'best'", keep="best")
    refused(r"is of another model: .* missing in the", model=tiny_net(norm=False))
    assert_equal(before, state(model))


def test_a_run_that_is_not_finished_cannot_be_made_longer(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), tiny_task(), QUIET, objective=Interrupted(1), folder=tmp_path)
    for epochs in (2, 4):
        with pytest.raises(TorchsliceError, match=f"epochs was 3, now {epochs}.*continued with more epochs once it is"):
            fit(tiny_net(), tiny_task(), replace(QUIET, epochs=epochs), folder=tmp_path)


@pytest.mark.parametrize("name", [FILE, BEST])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(tmp_path, content, name):
    fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path, keep="best")
    path, model = tmp_path / name, tiny_net(seed=1)
    before = state(model)
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(TorchsliceError, match=rf"{name} is damaged.*Delete it"):
        fit(model, tiny_task(), QUIET, folder=tmp_path, keep="best")
    assert_equal(before, state(model))


@pytest.mark.parametrize("name", [FILE, BEST])
def test_one_flipped_bit_of_a_weight_is_noticed(tmp_path, name):
    fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path, keep="best")
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for place in (header, (header + len(content)) // 2, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(TorchsliceError, match="is damaged: its content does not match its hash"):
            fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path, keep="best")
        content[place] ^= 1
    path.write_bytes(content)
    fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path, keep="best")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, state: tensors.pop("model.0.weight"),
        lambda tensors, state: tensors.update({"model.extra": torch.zeros(1)}),
        lambda tensors, state: tensors.update({"model.0.weight": torch.zeros(9, 1, 3, 3)}),
        lambda tensors, state: tensors.update({"optimizer.momentum_buffer.0.weight": torch.zeros(2, 2)}),
        lambda tensors, state: tensors.update({"optimizer.momentum_buffer.nothing": torch.zeros(2)}),
        lambda tensors, state: state.pop("history"),
        lambda tensors, state: state.update(history=3),
        lambda tensors, state: state.update(history=[{}]),
        lambda tensors, state: state.update(settings=None),
        lambda tensors, state: state.pop("first_epoch"),
        lambda tensors, state: state.clear(),
    ],
)
def test_a_file_that_says_something_else_is_an_error_of_ours(tmp_path, change):
    fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path)
    path = tmp_path / FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = json.loads(metadata["training"])
    change(tensors, found)
    text = json.dumps(found)
    save_file(tensors, path, {"training": text, "sha256": digest_of(tensors, text)})
    model = tiny_net(seed=1)
    before = state(model)
    with pytest.raises(TorchsliceError, match=FILE):
        fit(model, tiny_task(), QUIET, folder=tmp_path)
    assert_equal(before, state(model))


def test_one_changed_figure_is_noticed(tmp_path):
    fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path)
    path = tmp_path / FILE
    content = path.read_bytes()
    place = content.index(b"train_accuracy") + len(b'train_accuracy\\": ')
    assert content[place : place + 2] in (b"0.", b"1.")
    path.write_bytes(content[:place] + b"2" + content[place + 1 :])
    with pytest.raises(TorchsliceError, match="is damaged: its content does not match its hash"):
        fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path)


def test_the_tensors_are_only_read_where_they_are_needed(tmp_path):
    fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path)
    found, tensors = read_checkpoint(tmp_path / FILE, tensors=False)
    assert found["settings"]["epochs"] == 3 and tensors == {} and len(found["history"]) == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TorchsliceError, match="cannot write"):
        fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path / "file")


def test_interrupted_without_a_folder_says_so():
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(tiny_net(), tiny_task(), QUIET, objective=Interrupted(0))
    assert "nothing of it was kept" in caught.value.__notes__[0]


def test_nothing_is_left_where_the_first_write_fails(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchslice.training.checkpoint.save_file", full)
    with pytest.raises(TorchsliceError, match="No space left on device"):
        fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path / "run")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.undo()
    fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path / "run")


def test_two_never_train_in_one_folder(tmp_path):
    model = tiny_net()
    before = state(model)
    with locked(tmp_path), pytest.raises(TorchsliceError, match="another process is writing into"):
        fit(model, tiny_task(), QUIET, folder=tmp_path)
    assert_equal(before, state(model))
    fit(model, tiny_task(), QUIET, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, METRICS]


def test_a_log_that_was_not_written_any_more_is_made_up_for(tmp_path):
    rows = fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path)
    for lost in (b"", b"".join((tmp_path / METRICS).read_bytes().splitlines(True)[:1]), None):
        (tmp_path / METRICS).unlink() if lost is None else (tmp_path / METRICS).write_bytes(lost)
        fit(tiny_net(), tiny_task(), QUIET, folder=tmp_path)
        assert [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()] == rows
