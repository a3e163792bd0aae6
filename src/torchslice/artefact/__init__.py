"""Networks in files: save one, load it in another process, read what a file says."""

from .file import Artefact, load, read_record, save

__all__ = ["Artefact", "load", "read_record", "save"]
