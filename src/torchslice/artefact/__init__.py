"""Networks in files: save one, load it elsewhere, export it as a program, keep many in a store or on the Hub."""

from .export import Exported, export
from .file import Artefact, load, read_record, save
from .hub import pull, push
from .store import Entry, Store

__all__ = ["Artefact", "Entry", "Exported", "Store", "export", "load", "pull", "push", "read_record", "save"]
