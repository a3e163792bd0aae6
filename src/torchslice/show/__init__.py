"""What a network looks like: figures, and one page with all of them."""

from . import figures
from .page import Report, report

__all__ = ["Report", "figures", "report"]
