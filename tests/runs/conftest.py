"""The tiny runs that the command line is tested with."""

from tests.cli.conftest import copy_of, five, gates, own, shared, sources, standard, subtasks

__all__ = ["copy_of", "five", "gates", "own", "shared", "sources", "standard", "subtasks"]
