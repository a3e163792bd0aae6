"""Texts: tokens, padding and masks; files of labelled texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import torchslice as ts
from tests.texts import CLASSES, LONGEST, ROWS, WORDS, make_task, tokenizer, write_csv, write_folder
from torchslice import TorchsliceError
from torchslice.data import Texts, load, tokenizer_of, tokenizer_record


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def tokens(texts: Texts) -> list[list[int]]:
    return [entry.tolist() for entry in texts.tokens or ()]


RECORD = {"tokenizer": tokenizer_record(tokenizer())["tokenizer"], "pad_token": 0, "longest": LONGEST}
THREE = Texts(("cat", "i see the dog", "red snow"), torch.tensor([0, 0, 1]))


def test_a_batch_is_padded_to_its_longest_text_and_masked() -> None:
    texts = THREE.like(RECORD)
    first, second = texts.read([torch.tensor([0, 1]), torch.tensor([2])])
    assert first["input_ids"].tolist() == [[*ids("cat"), 0, 0, 0], ids("i see the dog")]
    assert first["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert second["input_ids"].tolist() == [ids("red snow")] and second["attention_mask"].tolist() == [[1, 1]]
    assert repr(texts) == "3 texts of 1 to 4 tokens" and repr(THREE) == "3 texts"


def test_tokens_stay_with_their_texts() -> None:
    texts = THREE.like(RECORD)
    assert tokens(texts.take(torch.tensor([2, 0]))) == [ids("red snow"), ids("cat")]
    kept = texts.take(torch.tensor([False, True, True]))
    assert kept.texts == ("i see the dog", "red snow") and tokens(kept) == [ids("i see the dog"), ids("red snow")]
    both = kept.join(THREE.take(torch.tensor([0])))  # which has no tokens yet
    assert tokens(both)[-1] == ids("cat") and both.labels.tolist() == [0, 1, 0]
    assert tokens(texts.relabelled(torch.tensor([1, 1, 0]))) == tokens(texts)
    assert texts.like(RECORD | {"max_length": None}).tokens is texts.tokens and texts.like({"mean": [0.5]}) is texts


def test_the_example_asks_most_of_a_model() -> None:
    task = make_task()
    longest = max(len(entry) for entry in task.train.tokens)
    highest = max(int(entry.max()) for entry in task.train.tokens)
    assert task.example["input_ids"].shape == (2, longest) and int(task.example["input_ids"].max()) == highest
    alone = THREE.like(RECORD).take(torch.tensor([1]))
    assert next(alone.read([alone.hardest]))["input_ids"].shape == (2, 4)


def test_texts_without_a_tokenizer_are_told_apart_and_refused() -> None:
    task = ts.data.task(Texts(*zip(*[(text, [*CLASSES].index(kind)) for text, kind in ROWS], strict=True)))
    with pytest.raises(TorchsliceError, match=r"not tokenised yet: name the tokenizer of the model"):
        _ = task.example
    assert task.fingerprint != task.like(RECORD).fingerprint == task.like(RECORD).fingerprint


def test_a_text_longer_than_the_model_takes_is_refused_or_cut() -> None:
    long = Texts(("cat", "dog " * 20), torch.tensor([0, 1]))
    with pytest.raises(
        TorchsliceError, match=r"1 of 2 texts are longer than the model takes, 16 tokens; the first, 'd"
    ):
        long.like(RECORD)
    cut = Texts(long.texts, long.labels, max_length=5).like(RECORD)
    assert tokens(cut)[1] == ids("dog") * 5 and cut.preprocessing["max_length"] == 5
    assert tokens(long.like(cut.preprocessing)) == tokens(cut)  # as a saved network has it
    for length in (1, 17):
        with pytest.raises(TorchsliceError, match="'max_length' must be 2 to 16, what the model takes"):
            Texts(long.texts, long.labels, max_length=length).like(RECORD)


def test_a_record_of_a_tokenizer_is_enough(tmp_path: Path) -> None:
    fast = tokenizer()
    fast(["cat", "i see the dog"], padding="max_length", truncation=True, max_length=3)  # which it remembers
    record = tokenizer_record(fast)
    assert record == RECORD == tokenizer_record(write_folder(tmp_path))
    assert tokenizer_of(record).encode("i see the dog").ids == ids("i see the dog")
    with pytest.raises(TorchsliceError, match="a dict is no fast tokenizer of transformers"):
        tokenizer_record({})
    with pytest.raises(TorchsliceError, match="there is no folder .*nowhere with a tokenizer"):
        tokenizer_record(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TorchsliceError, match="holds no tokenizer that can be read"):
        tokenizer_record(tmp_path / "empty")
    with pytest.raises(TorchsliceError, match="the tokenizer of the network cannot be read"):
        tokenizer_of({"tokenizer": "{}"})


# -- files --------------------------------------------------------------------------------------------------------
def test_csv(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "sentences.csv", [("7", *row) for row in ROWS], ("number", "text", "label"))
    task = load(f"csv:{path}", tokenizer=tokenizer())
    assert task.name == "sentences" and task.classes == tuple(CLASSES)
    assert len(task.train) + len(task.validation) + len(task.test) == len(ROWS) and len(task.test) > 20
    assert all(
        dict(ROWS)[text] == task.classes[label] for text, label in zip(task.test.texts, task.test.labels, strict=True)
    )
    cut = load(f"csv:{path}", tokenizer=tokenizer(), max_length=2)
    assert max(map(len, cut.train.tokens)) == 2
    folder = tmp_path / "parts"
    folder.mkdir()
    write_csv(folder / "train.csv", ROWS[3:])
    write_csv(folder / "test.csv", ROWS[:3])
    assert load(f"csv:{folder}").test.texts == tuple(text for text, _ in ROWS[:3])


def test_bad_csv(tmp_path: Path) -> None:
    def refused(message: str, path: Path) -> None:
        with pytest.raises(TorchsliceError, match=message):
            load(f"csv:{path}")

    refused(
        r"line 3: there is no label; give every text its label", write_csv(tmp_path / "a.csv", [("x", "1"), ("y", "")])
    )
    refused(r"line 2: there is no text", write_csv(tmp_path / "b.csv", [(" ", "1")]))
    refused(r"line 2: there is no label", write_csv(tmp_path / "c.csv", [("x",)]))
    refused(
        "names the columns text and label; it begins with", write_csv(tmp_path / "d.csv", header=("sentence", "label"))
    )
    refused("d.csv has no row|has no row", write_csv(tmp_path / "e.csv", []))
    refused("cannot be read as CSV in UTF-8", tmp_path / "absent.csv")
    (tmp_path / "latin.csv").write_bytes("text,label\né,1\n".encode("latin-1"))
    refused("cannot be read as CSV in UTF-8", tmp_path / "latin.csv")
    refused("a classifier needs at least two", write_csv(tmp_path / "f.csv", [("x", "1")] * 9))


def test_known_data_sets_by_hand(tmp_path: Path) -> None:
    for name, lines in {
        "trec/TREC.train": ["NUM:date When was caf\xe9 ?", "NUM:count How many ?", "LOC:city Where ?"] * 6,
        "trec/TREC.test": ["LOC:city Where ?"],
        "mr/rt-polarity.neg": ["bad film", ""] * 9,
        "mr/rt-polarity.pos": ["good film"] * 9,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes("\n".join(lines).encode("latin-1"))
    (tmp_path / "sst2").mkdir()
    for name in ("train", "dev", "test"):
        (tmp_path / f"sst2/stsa.binary.{name}").write_text("1 good\n0 bad\n" * 5)
    assert load("trec", tmp_path).classes == ("LOC", "NUM")
    fine = load("trec-fine", tmp_path)
    assert fine.classes == ("LOC:city", "NUM:count", "NUM:date") and "When was café ?" in fine.train.texts
    assert load("trec", tmp_path).test.labels.tolist() == [0] and fine.test.labels.tolist() == [0]
    for name in ("sst2", "mr"):
        task = load(name, tmp_path)
        assert task.classes == ("negative", "positive")
        words = {
            text.split()[0]: task.classes[label]
            for text, label in zip(task.train.texts, task.train.labels, strict=True)
        }
        assert words == {"bad": "negative", "good": "positive"}
    (tmp_path / "trec/TREC.test").write_text("LOC:city Where ?\nwhy\n")
    with pytest.raises(TorchsliceError, match="TREC.test, line 2: 'why' is not of the form LABEL TEXT"):
        load("trec", tmp_path)
    with pytest.raises(TorchsliceError, match="rt-polarity.neg cannot be read .*Put the files of https://"):
        load("mr", tmp_path / "elsewhere")
    with pytest.raises(TorchsliceError, match=r"data set 'mr': .*'image_size'. It takes: .*tokenizer=None"):
        load("mr", tmp_path, image_size=3)
    (tmp_path / "sst2/stsa.binary.dev").write_text("1 good\n2 what\n")
    with pytest.raises(TorchsliceError, match="sst2 has the label '2'"):
        load("sst2", tmp_path)


def test_real_questions_and_reviews(real_data_dir: Path) -> None:
    if not (real_data_dir / "trec").is_dir():
        pytest.skip("real texts: TORCHSLICE_DATA holds no trec")
    sizes = {"trec": (6, 5452, 500), "trec-fine": (50, 5452, 500), "sst2": (2, 6920 + 872, 1821), "mr": (2, 8530, 2132)}
    for name, (classes, rest, test) in sizes.items():
        task = load(name, real_data_dir)
        assert (len(task.classes), len(task.train) + len(task.validation), len(task.test)) == (classes, rest, test)
