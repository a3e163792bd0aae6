"""Labelled samples for training and judging: from images in memory, folders on disk, or any iterable of batches."""

from .build import task
from .images import Images
from .samples import Samples
from .sources import load, names
from .splits import Split, hold_out, limit
from .stored import Stored
from .task import Task, check_task, joined
from .text import Texts, tokenizer_of, tokenizer_record

__all__ = [
    "Images",
    "Samples",
    "Split",
    "Stored",
    "Task",
    "Texts",
    "check_task",
    "hold_out",
    "joined",
    "limit",
    "load",
    "names",
    "task",
    "tokenizer_of",
    "tokenizer_record",
]
