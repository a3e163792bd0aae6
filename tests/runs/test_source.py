"""A command starts from a run, a saved network, or a network by name with its weights; all give the same neurons."""

import pytest

import torchslice as ts
from torchslice import TorchsliceError
from torchslice.runs import Opening, Run
from torchslice.runs.slicefile import SliceFile, digest_of_model
from torchslice.runs.source import data_words, pairs

RUNNING = {"seed": 0, "device": "cpu"}


def named(**options):
    return Opening(model_argument=["width=0.125"], **options).open("convnet", "digits", **RUNNING)


@pytest.fixture
def opened(sources):
    """The same network from everywhere."""
    (run,), pt, safetensors, (whole, data) = sources.values()
    return [
        Opening().open(str(run), None, **RUNNING),
        *(named(weights=words[-1]) for words in (pt, safetensors)),
        Opening().open(str(whole), data, **RUNNING),
    ]


def test_all_sources_give_the_same(opened):
    logits = [ts.judge.predict(source.model, source.task) for source in opened]
    assert all(found.equal(logits[0]) for found in logits)
    assert {source.neurons().classes for source in opened} == {tuple("0123456789")}
    assert {tuple(source.data) for source in opened} == {("digits",)} and not any(source.own for source in opened)
    assert [source.run is not None for source in opened] == [True, False, False, False]


def test_slices_come_from_a_file_from_the_run_or_are_found(opened, standard, tmp_path):
    run, other = opened[0], opened[1]
    with pytest.raises(TorchsliceError, match="no slices yet"):
        run.slices()
    found = ts.semantic.class_slices(other.neurons(), other.task)
    assert {**other.slices()} == {**found} and other.critical() == found.critical
    mine = tmp_path / "mine.json"
    SliceFile(mine).write({"3": run.neurons().full()}, digest_of_model(run.model), {})
    from_file = Opening(slices=mine).open(str(standard), None, **RUNNING)
    assert from_file.slices() == {"3": run.neurons().full()} and from_file.critical() == run.neurons().full()
    assert named(weights=standard.parent / "weights.pt", slices=mine).slices() == from_file.slices()
    SliceFile(mine).write({"3": found["3"]}, digest_of_model(run.model), {"critical": found.critical.to_plain()})
    assert from_file.slices() == {"3": found["3"]} and from_file.critical() == found.critical != found["3"]
    SliceFile(mine).write({}, "0" * 64, {})
    with pytest.raises(TorchsliceError, match="belongs to other weights; find them anew: torchslice slice"):
        from_file.slices()


def test_gates_stay_until_they_are_asked_away(gates):
    source = Opening().open(str(gates), None, **RUNNING)
    assert source.model is source.network and source.run == Run.open(gates)
    folded, dropped = (source.neurons(gates=how).model for how in ("fold", "drop"))
    assert not ts.judge.predict(folded, source.task).equal(ts.judge.predict(dropped, source.task))


@pytest.mark.parametrize("module", ["trainedofatest", "packageofatest.nets"])
def test_a_network_of_ones_own_needs_no_weights(tmp_path, monkeypatch, module):
    file = (tmp_path / module.replace(".", "/")).with_suffix(".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        "import torchslice as ts\n"
        "def trained(num_classes):\n"
        "    return ts.models.create('convnet', channels=1, width=0.125)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    source = Opening().open(f"{module}:trained", "digits", **RUNNING)
    assert source.own and not source.model.training


def test_a_function_of_ones_own_takes_options_of_any_name(tmp_path, monkeypatch):
    (tmp_path / "dataofatest.py").write_text(
        "import torchslice as ts\n"
        "def digits(path, split, name='x'):\n"
        "    return ts.data.load('digits').restrict([str(path), str(split)])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    assert Opening(data_option=["path=3", "split=8"]).load("dataofatest:digits", seed=0).classes == ("3", "8")
    with pytest.raises(TorchsliceError, match="'path'.*It takes: "):
        Opening(data_option=["path=3"]).load(f"folder:{tmp_path}", seed=0)


def test_data_are_named_as_they_were_loaded():
    options = {"image_size": 64, "std": [0.5, 0.5, 0.5], "layout": "train", "mode": "False"}
    words = data_words("folder:my images", options, "data")
    assert words[:3] == ["folder:my images", "--data-option", "image_size=64"] and words[-2:] == ["--data-dir", "data"]

    assert pairs([text for text in words if "=" in text]) == options
