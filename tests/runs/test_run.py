"""A run on disk: it starts, goes on, refuses another, survives leftovers, and ties slices to weights."""

import json
import random
from dataclasses import replace

import pytest
import torch

import torchslice as ts
from tests.cli.conftest import TINY, train
from torchslice import TorchsliceError, files
from torchslice.find.gates import GatedModel
from torchslice.runs import Run
from torchslice.runs.recipe import Method
from torchslice.runs.run import prefixes, settled

CHECKPOINT = "training/checkpoint.safetensors"


@pytest.fixture(scope="module")
def task():
    return TINY.load_task()


def go(run, task):
    return run.train(task, device="cpu", progress=False)


def epochs(count):
    return replace(TINY, training=replace(TINY.training, epochs=count))


# -- begin and go on ----------------------------------------------------------------------------------------------
def test_a_run_is_opened_as_it_was_started(standard, task):
    run = Run.open(standard)
    assert run.recipe == TINY and run.fingerprint == task.fingerprint and run.epochs_done == 2
    assert run == Run.start(standard, TINY, task)
    assert [row["epoch"] for row in go(run, task)] == [1, 2]
    plain = json.loads((standard / "run.json").read_text())
    assert plain["classes"] == list("0123456789") and set(plain["versions"]) == {"torchslice", "torch", "python"}


def test_more_epochs_continue_a_finished_run_only(standard, copy_of, task, tmp_path):
    run = Run.start(copy_of(standard), epochs(3), task)
    assert run.recipe.training.epochs == 3 and Run.open(run.folder) == run
    with pytest.raises(TorchsliceError, match="2 of 3 epochs"):
        run.check_finished()
    with pytest.raises(TorchsliceError, match="epochs was 3, now 4.*A finished run can be continued"):
        Run.start(run.folder, epochs(4), task)
    assert [row["epoch"] for row in go(run, task)] == [1, 2, 3]
    run.check_finished()


def test_more_epochs_of_sub_task_training_go_to_its_second_part(subtasks):
    recipe = replace(epochs(6), method=Method())
    assert recipe.first_epochs == 3 and settled(subtasks, recipe).first_epochs == 1
    with pytest.raises(TorchsliceError, match="standard_epochs was 1, now 3"):
        settled(subtasks, replace(recipe, method=Method(standard_epochs=3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "lenet"}, "model was 'convnet', now 'lenet'"),
        ({"method": Method("gates")}, "method was 'standard', now 'gates'"),
        ({"training": replace(TINY.training, seed=1)}, "seed was 0, now 1"),
        ({"training": replace(TINY.training, epochs=1)}, "epochs was 2, now 1"),
        ({"model_arguments": {}}, "model_arguments was {'width': 0.125}, now {}"),
        ({"train_limit": 5}, "train_limit was None, now 5"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(standard, change, message):
    with pytest.raises(TorchsliceError, match=f"holds another run: {message}"):
        settled(standard, replace(TINY, **change))


def test_other_samples_are_refused(standard, task):
    with pytest.raises(TorchsliceError, match="other samples"):
        Run.start(standard, TINY, task.limit(train=100))


def test_a_folder_of_something_else_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("")
    for folder in (tmp_path, tmp_path / "papers" / "thesis.tex"):
        with pytest.raises(TorchsliceError, match="no run of torchslice; choose a new or empty folder"):
            settled(folder, TINY)


def test_what_killed_writers_left_does_not_block(tmp_path, task):
    folder = tmp_path / "run"
    (folder / "training").mkdir(parents=True)
    for leftover in (".run.json.0123abcd.tmp", "training/.checkpoint.safetensors.0123abcd.tmp"):
        (folder / leftover).write_text("{")
    assert len(go(Run.start(folder, epochs(1), task), task)) == 1


@pytest.mark.parametrize("method", ["standard", "gates", "subtasks"])
def test_a_full_disk_at_any_file_leaves_a_run_that_the_same_call_goes_on_with(tmp_path, task, monkeypatch, method):
    recipe, real = replace(TINY, method=Method(method), train_limit=200), files.os.replace
    recipe = replace(recipe, training=replace(recipe.training, batch_size=100))
    for fails_at in range(7):
        folder, left = tmp_path / str(fails_at), iter(range(fails_at, -1, -1))

        def full(source, target, left=left):
            if next(left, None) == 0:
                raise OSError(28, "No space left on device")
            real(source, target)

        limited = recipe.load_task()
        monkeypatch.setattr(files.os, "replace", full)
        try:
            go(Run.start(folder, recipe, limited), limited)
        except TorchsliceError as error:
            assert "No space left on device" in str(error)
        monkeypatch.setattr(files.os, "replace", real)
        run = Run.start(folder, recipe, limited)
        go(run, limited)
        run.check_finished()


@pytest.mark.parametrize("kind", [TorchsliceError, torch.OutOfMemoryError, ValueError])
def test_an_early_error_leaves_the_folder_free(tmp_path, task, monkeypatch, kind):
    def fails(*args, **kwargs):
        raise kind("no.")

    monkeypatch.setattr("torchslice.runs.run.fit", fails)
    with pytest.raises(kind, match="no"):
        go(Run.start(tmp_path / "run", TINY, task), task)
    assert not (tmp_path / "run").exists()


def test_a_twin_is_refused_and_spoils_nothing(tmp_path, task):
    run = Run.start(tmp_path / "run", TINY, task)
    with files.locked(run.folder):
        for twin in (lambda: go(run, task), lambda: Run.start(run.folder, TINY, task)):
            with pytest.raises(TorchsliceError, match="another process is writing into"):
                twin()
    go(run, task)
    run.check_finished()


def test_a_folder_is_remembered_from_everywhere(tmp_path, task, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run.start("run", TINY, task, data_dir="data")
    assert Run.open("run").data_dir == str(tmp_path / "data") == run.data_dir


# -- the network --------------------------------------------------------------------------------------------------
def test_the_network_is_the_trained_one(standard, gates, task):
    neurons, gated = (Run.open(folder).network(task, device="cpu") for folder in (standard, gates))
    assert isinstance(gated, GatedModel) and not gated.training and not neurons.model.training
    (last,) = [row["validation_accuracy"] for row in go(Run.open(standard), task) if row["epoch"] == 2]
    assert ts.accuracy(neurons.model, task, "validation").overall == last and neurons.classes == task.classes


def test_other_data_are_refused(standard, copy_of):
    folder = copy_of(standard)
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**content, "fingerprint": "0" * 16}))
    with pytest.raises(TorchsliceError, match="other samples now.*data_dir="):
        Run.open(folder).load_task()


# -- slices -------------------------------------------------------------------------------------------------------
@pytest.fixture
def sliced(standard, copy_of, task):
    run = Run.open(copy_of(standard))
    neurons = run.network(task, device="cpu")
    run.keep_slices({"3": neurons.random(0.5), "8": neurons.full()}, {"by": "a test"})
    return run


def test_slices_there_and_back(sliced, task):
    assert sliced.slices() == {"3": sliced.network(task, device="cpu").random(0.5), "8": sliced.slices()["8"]}
    assert json.loads((sliced.folder / "slices.json").read_text())["by"] == "a test"


def test_slices_do_not_depend_on_how_long_an_epoch_took(sliced, tmp_path):
    path, twin, found = sliced.folder / CHECKPOINT, train(tmp_path / "twin", TINY) / CHECKPOINT, sliced.slices()
    assert path.read_bytes() != twin.read_bytes()  # the seconds
    path.write_bytes(twin.read_bytes())
    assert sliced.slices() == found


def test_slices_of_other_weights_are_refused(sliced, task):
    longer = Run.start(sliced.folder, epochs(3), task)
    go(longer, task)
    with pytest.raises(TorchsliceError, match=r"slices.json belongs to other weights.*torchslice slice"):
        longer.slices()


def test_sub_task_runs_have_rankings_and_fall_back_on_their_slices(subtasks, standard, copy_of, task):
    run = Run.open(subtasks)
    rankings = run.rankings()
    assert run.slices() == prefixes(rankings) and tuple(rankings) == task.classes
    neurons = run.network(task, device="cpu")
    assert rankings["3"].layers == {name: layer.count for name, layer in neurons.layers.items()}
    with pytest.raises(TorchsliceError, match="no slices yet.*--by contribution"):
        Run.open(standard).slices()
    with pytest.raises(TorchsliceError, match="trained with method 'standard', without rankings"):
        Run.open(standard).rankings()
    folder = copy_of(subtasks)
    (folder / "rankings.json").write_text((folder / "rankings.json").read_text().replace("classes", "lost"))
    with pytest.raises(TorchsliceError, match=r"rankings.json is not of torchslice, or damaged: it has no classes"):
        Run.open(folder).rankings()


# -- damage -------------------------------------------------------------------------------------------------------
def test_a_flipped_bit_in_a_checkpoint_is_found(sliced, task):
    path = sliced.folder / CHECKPOINT
    whole, draw = path.read_bytes(), random.Random(0)
    for place in [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(60))]:
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        for reads in (lambda: sliced.network(task, device="cpu"), sliced.slices):
            with pytest.raises(TorchsliceError, match="damaged"):
                reads()
