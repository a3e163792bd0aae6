"""A tiny encoder and its tokenizer in a folder, as transformers writes them, and made-up sentences of three classes."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchslice as ts
from torchslice.data import Task, Texts, tokenizer_record
from torchslice.imports import import_transformers

CLASSES = {"animals": "cat dog horse goat", "colours": "red blue green black", "weather": "rain snow wind sun"}
FRAMES = ("i see the {}", "was there any {} in the house today", "why is {} what you ask for", "{}")
ROWS = [(frame.format(word), kind) for kind, words in CLASSES.items() for word in words.split() for frame in FRAMES * 3]
WORDS = ["[PAD]", "[UNK]", *sorted({word for text, _ in ROWS for word in text.split()})]
LONGEST = 16


@cache
def tokenizer() -> Any:
    """A tokenizer that knows the words of the sentences."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    transformers = import_transformers()
    own = tokenizers.Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, "[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    known = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": LONGEST}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **known)


def config(**changes: Any) -> Any:
    """The configuration of a BERT of two layers."""
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": LONGEST, "num_labels": len(CLASSES)}
    return import_transformers().BertConfig(**{**sizes, **changes})


def write_folder(folder: Path, network: nn.Module | None = None, **changes: Any) -> Path:
    """Write tokenizer and configuration into a folder, or a network with its own; return the folder."""
    import_transformers().logging.disable_progress_bar()  # it starts a thread
    writer: Any = config(**changes) if network is None else network
    writer.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_csv(path: Path, rows: Any = ROWS, header: tuple[str, ...] = ("text", "label")) -> Path:
    """Write rows of a text and its label."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def make_task() -> Task:
    """The sentences as tokens."""
    texts, labels = zip(*ROWS, strict=True)
    split = Texts(texts, torch.tensor([[*CLASSES].index(label) for label in labels]))
    return ts.data.task(split, classes=[*CLASSES], name="sentences").like(tokenizer_record(tokenizer()))
