"""Networks by name: built in for images of about 32x32, from torchvision and timm, or the user's own."""

from .catalogue import create, names
from .weights import load_weights

__all__ = ["create", "load_weights", "names"]
