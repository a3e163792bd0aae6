"""Texts in memory, as the tokens of a model's own tokenizer, padded batch by batch.

Shapes: n texts of a split, B batch, T tokens of the longest text of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import TorchsliceError, first_line
from ..imports import import_optional, import_transformers
from ..inputs import Inputs
from .splits import Split, check_labels


@dataclass(frozen=True, eq=False)
class Texts(Split):
    """Texts and their labels; a model gets {"input_ids": int64 [B, T], "attention_mask": int64 [B, T]}.

    Attributes:
        preprocessing: the record of a tokenizer, see `tokenizer_record`; None until a task is `like` a model's.
        max_length: tokens, special ones included, after which a text is cut; None cuts nothing.
        tokens: the token ids of every text, made by `like`.

    >>> texts = Texts(("a dog barks", "it rains"), torch.tensor([0, 1]))
    >>> len(texts.take(torch.tensor([1])))
    1
    """

    texts: tuple[str, ...]
    labels: Tensor
    preprocessing: dict[str, Any] | None = None
    max_length: int | None = None
    tokens: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", check_labels(self.labels, len(self.texts)))

    def take(self, rows: Tensor) -> Texts:
        kept = torch.arange(len(self))[rows].tolist()
        tokens = None if self.tokens is None else tuple(self.tokens[i] for i in kept)
        return replace(self, texts=tuple(self.texts[i] for i in kept), labels=self.labels[kept], tokens=tokens)

    def join(self, other: Texts) -> Texts:
        if self.preprocessing is not None:
            other = other.like(self.preprocessing)
        tokens = None if self.tokens is None else (*self.tokens, *(other.tokens or ()))
        labels = torch.cat([self.labels, other.labels])
        return replace(self, texts=self.texts + other.texts, labels=labels, tokens=tokens)

    def like(self, preprocessing: Mapping[str, Any]) -> Texts:
        """Return the same texts as tokens; raise where one is longer than the model takes."""
        if preprocessing == self.preprocessing or "tokenizer" not in preprocessing:
            return self
        cut = preprocessing.get("max_length") if self.max_length is None else self.max_length
        longest, tokenizer = preprocessing["longest"], tokenizer_of(preprocessing)
        if cut is not None:
            if not 2 <= cut <= longest:
                raise TorchsliceError(f"'max_length' must be 2 to {longest}, what the model takes; got {cut}.")
            tokenizer.enable_truncation(cut)
        found = tuple(torch.tensor(entry.ids) for entry in tokenizer.encode_batch(list(self.texts)))
        if too_long := [i for i, ids in enumerate(found) if len(ids) > longest]:
            raise TorchsliceError(
                f"{len(too_long)} of {len(self)} texts are longer than the model takes, {longest} tokens; the first, "
                f"{self.texts[too_long[0]][:40]!r}..., has {len(found[too_long[0]])}. Shorten them, or cut them with "
                f"the option 'max_length={longest}' of the data."
            )
        return replace(self, preprocessing={**preprocessing, "max_length": cut}, max_length=cut, tokens=found)

    @cached_property
    def hardest(self) -> Tensor:
        """Indices of the longest text and of the one with the highest token id: what asks most of a model."""
        tokens = self._tokens
        chosen = [max(range(len(self)), key=lambda i: of(tokens[i])) for of in (len, lambda ids: int(ids.max()))]
        return torch.tensor(chosen if chosen[0] != chosen[1] else [chosen[0], (chosen[0] + 1) % len(self)])

    def inputs_of(self, rows: Tensor) -> Inputs:
        ids, pad = [self._tokens[i] for i in rows.tolist()], (self.preprocessing or {})["pad_token"]
        mask = pad_sequence([torch.ones_like(own) for own in ids], batch_first=True)
        padded = pad_sequence(ids, batch_first=True, padding_value=pad)
        return {"input_ids": padded, "attention_mask": mask}

    @property
    def _tokens(self) -> tuple[Tensor, ...]:
        if self.tokens is None:
            raise TorchsliceError(
                "these texts are not tokenised yet: name the tokenizer of the model, a folder or an object of "
                "transformers, with the option 'tokenizer=...' of the data."
            )
        return self.tokens

    def update(self, digest: Any) -> None:
        digest.update(json.dumps([self.texts, self.preprocessing]).encode())
        digest.update(self.labels.numpy().data)

    def __repr__(self) -> str:
        if self.tokens is None:
            return f"{len(self)} texts"
        lengths = sorted(map(len, self.tokens)) or [0]
        return f"{len(self)} texts of {lengths[0]} to {lengths[-1]} tokens"


def tokenizer_record(tokenizer: Any) -> dict[str, Any]:
    """Return all that is needed of a tokenizer, as plain data: it is kept with sub-models, which then need no other.

    Args:
        tokenizer: a folder of transformers, or a tokenizer that transformers made of one; it must be a fast one.

    Returns:
        "tokenizer" is the tokenizer as the package tokenizers writes it (JSON), "pad_token" an id, "longest" the number
        of tokens that its model takes.
    """
    if isinstance(tokenizer, str | Path):
        path = Path(tokenizer).expanduser()
        if not path.is_dir():
            raise TorchsliceError(f"there is no folder {path} with a tokenizer.")
        auto = import_transformers().AutoTokenizer
        try:
            tokenizer = auto.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of many kinds
            raise TorchsliceError(f"{path} holds no tokenizer that can be read ({first_line(error)}).") from error
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise TorchsliceError(
            f"a {type(tokenizer).__name__} is no fast tokenizer of transformers; give one, or the folder of one."
        )
    own = import_optional("tokenizers", extra="text").Tokenizer.from_str(fast.to_str())
    own.no_padding()
    own.no_truncation()
    pad = next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)
    return {"tokenizer": own.to_str(), "pad_token": pad, "longest": tokenizer.model_max_length}


def tokenizer_of(preprocessing: Mapping[str, Any]) -> Any:
    """Return the tokenizer that `tokenizer_record` wrote down."""
    tokenizers = import_optional("tokenizers", extra="text")
    try:
        return tokenizers.Tokenizer.from_str(preprocessing["tokenizer"])
    except Exception as error:
        raise TorchsliceError(f"the tokenizer of the network cannot be read ({first_line(error)}).") from error
