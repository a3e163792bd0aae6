"""Networks of transformers, from a folder or a configuration on this machine: nothing is downloaded.

Shapes: B batch, T tokens, C classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TorchsliceError, first_line
from ..imports import import_transformers

CLASSIFIERS = {
    "SequenceClassification": "AutoModelForSequenceClassification",
    "ImageClassification": "AutoModelForImageClassification",
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class Encoder(nn.Module):
    """A classifier of texts: the mean of an encoder's outputs over the tokens that the mask keeps, and a linear layer.

    Returns logits [B, C] for input_ids and attention_mask, int64 [B, T]; what else the encoder takes is passed on.
    """

    def __init__(self, encoder: nn.Module, width: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder, self.dropout, self.classifier = encoder, nn.Dropout(dropout), nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Tensor:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **others).last_hidden_state
        kept = attention_mask[:, :, None].to(tokens.dtype)
        return self.classifier(self.dropout((tokens * kept).sum(1) / kept.sum(1)))


def create(path: str, num_classes: int, **arguments: Any) -> nn.Module:
    """Make the network of a folder or of a file with a configuration, with weights if the folder has any.

    What the configuration calls a classifier of sequences or images is one, with a new last layer where the folder's
    answers other classes. Any other network is taken as an encoder of texts, see `Encoder`. Weights must be
    safetensors, and code in the folder is not run.

    Args:
        arguments: of the configuration, instead of what it says, such as num_hidden_layers.
    """
    transformers, folder, config = import_transformers(), Path(path).expanduser(), read_config(path)
    same_classes = config.num_labels == num_classes
    config.num_labels = num_classes
    attention = arguments.pop("attn_implementation", "sdpa")
    for name, value in arguments.items():
        if not hasattr(config, name):
            raise TorchsliceError(f"a {type(config).__name__} has no {name!r}; it has {', '.join(config.to_dict())}.")
        setattr(config, name, value)
    kind = classifier_of(config)
    auto = getattr(transformers, CLASSIFIERS[kind] if kind else "AutoModel")
    options = {"attn_implementation": attention, "dtype": torch.float32, "trust_remote_code": False}
    with _quiet(transformers):
        if has_weights(path):
            network, found = auto.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=kind is not None and not same_classes,
                output_loading_info=True,
                **options,
            )
            inner = [f"{network.base_model_prefix}."] if kind else [""]
            lacking = [n for n in found["missing_keys"] if n.startswith(*inner) and "pooler" not in n]
            if lacking:
                raise TorchsliceError(f"the weights in {path} lack {lacking[0]!r} of a {type(network).__name__}.")
        else:
            network = auto.from_config(config, **options)
    config.name_or_path = ""  # a path of this machine, which has no place in a saved network
    for module in network.modules():
        if hasattr(module, "name_or_path"):
            module.name_or_path = ""
    return network if kind else Encoder(network, config.hidden_size, num_classes)


def read_config(path: str) -> Any:
    """Return the configuration in a folder or in a JSON file."""
    place = Path(path).expanduser()
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise TorchsliceError(f"there is no {file}; hf: needs a folder with config.json, or such a file.")
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds
        raise TorchsliceError(f"{file} is no configuration that transformers knows ({first_line(error)}).") from error
    if getattr(config, "pad_token_id", None) is None:  # which classifiers behind a decoder look for
        config.pad_token_id = getattr(config, "eos_token_id", None)
    return config


def classifier_of(config: Any) -> str | None:
    """Return what a network classifies, by the name of its class; None for an encoder."""
    names = config.architectures or []
    return next((kind for kind in CLASSIFIERS if any(name.endswith(f"For{kind}") for name in names)), None)


def has_weights(path: str) -> bool:
    """Whether a folder has weights; raise where they are in another form than safetensors."""
    folder = Path(path).expanduser()
    if any((folder / name).is_file() for name in WEIGHTS):
        return True
    if others := [*folder.glob("pytorch_model*.bin")] if folder.is_dir() else []:
        raise TorchsliceError(
            f"{others[0]} is a pickle, which could run code. Write the weights as safetensors where you trust them: "
            "model.save_pretrained(folder)."
        )
    return False


def is_trained(path: str, num_classes: int) -> bool:
    """Whether a folder holds a whole classifier of so many classes."""
    config = read_config(path)
    return has_weights(path) and classifier_of(config) is not None and config.num_labels == num_classes


def check_tokenizer(path: str, size: int, longest: int) -> int:
    """Return how many tokens of a text the network takes; raise unless it knows all `size` tokens of a tokenizer."""
    config = read_config(path)
    known = getattr(config, "vocab_size", size)
    if size > known:
        raise TorchsliceError(
            f"the tokenizer in {path} has {size} tokens and its network knows {known}; they do not belong together. "
            "Give the folder the tokenizer of its network."
        )
    return min(longest, getattr(config, "max_position_embeddings", None) or longest)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from reporting what is known: that a new classifier has new weights."""
    level, shown = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if shown:
            transformers.logging.enable_progress_bar()
