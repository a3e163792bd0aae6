"""Artefacts on the Hugging Face Hub: one file and a card that is written from what the file says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TorchsliceError, first_line
from ..imports import import_optional
from ..tables import percent
from .file import read_record
from .names import is_known
from .store import about, reading_record

FILE = "torchslice.safetensors"
KEPT = ("neuron_retention", "param_retention", "mac_retention")


def push(path: str | Path, repo: str, *, private: bool = True) -> str:
    """Upload an artefact, and a card made for it, to a model repository "USER/NAME", and return its address.

    The repository is made if there is none, `private` or not. Whoever may read it can load the file; what it holds is
    checked first.
    """
    hub = import_optional("huggingface_hub", extra="hub")
    client, record = hub.HfApi(), read_record(path)
    files = {FILE: str(path), "README.md": card(record, f'pull("{repo}")').encode()}
    adds = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    try:
        client.create_repo(repo, private=private, exist_ok=True)
        client.create_commit(repo, adds, commit_message="Upload a network of torchslice")
    except Exception as error:  # of the network and of the Hub, of many kinds
        raise TorchsliceError(f"cannot push to {repo}: {first_line(error)}. Log in with: hf auth login") from error
    return f"https://huggingface.co/{repo}"


def pull(repo: str, *, revision: str | None = None) -> Path:
    """Download the artefact of a repository that `push` made and return its file, which is checked by its hash.

    `revision` is a branch, tag or commit of the repository.
    """
    hub = import_optional("huggingface_hub", extra="hub")
    try:
        path = hub.HfApi().hf_hub_download(repo, FILE, revision=revision)
    except Exception as error:  # of the network and of the Hub, of many kinds
        raise TorchsliceError(f"cannot pull {FILE} from {repo}: {first_line(error)}. Check the name.") from error
    read_record(path)
    return Path(path)


def _brief(preprocessing: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return how inputs are made without what is long, such as a tokenizer."""
    if preprocessing is None:
        return None
    return {name: value if len(str(value)) < 200 else "in the file" for name, value in preprocessing.items()}


@reading_record()
def card(record: Mapping[str, Any], file: str) -> str:
    """Return the model card of an artefact, Markdown: what it is for, what it costs, what it says of itself, its use.

    Args:
        file: code that gives its path: a call of something in `torchslice.artefact`.

    >>> ts.save(small, folder / "pair.safetensors", classes=["3", "8"])
    >>> print(card(read_record(folder / "pair.safetensors"), "pull('me/pair')").splitlines()[6])
    A network that tells 2 classes apart: 3, 8.
    """
    known = about(record)
    classes = ", ".join(known["classes"]) or "their names are not known"
    needs = sorted({module["class"].partition(":")[0] for module in record["modules"].values()})
    own = [name for name in needs if not is_known(name)]
    permission = ", allow_import=True" if own else ""
    kept = [(name, record["metrics"][name]) for name in KEPT if name in (record["metrics"] or {})]
    figures = [("parameters", f"{known['parameters']:,}"), ("accuracy, as saved with it", percent(known["accuracy"]))]
    figures += [(name.replace("_", " "), percent(value)) for name, value in kept]
    lines = [
        *("---", "library_name: torchslice", "tags:", "- torchslice", "---", ""),
        f"A network that tells {len(known['classes'])} classes apart: {classes}.",
        *("", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures), ""),
        *("```python", "import torchslice as ts", f"from torchslice.artefact import {file.partition('(')[0]}", ""),
        *(f"part = ts.load({file}{permission})", "logits = part.model(inputs)  # in the order of part.classes"),
        *("```", ""),
        f"Inputs are made so: `{json.dumps(_brief(record['preprocessing']))}`.",
        *([f"Loading imports {', '.join(own)}, which runs its code."] if own else []),
        f"SHA-256 of the content: `{known['sha256']}`.",
    ]
    return "\n".join(lines) + "\n"
