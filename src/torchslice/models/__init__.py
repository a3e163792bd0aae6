"""Networks by name: built in for images of about 32x32, from torchvision and timm, or the user's own."""

from .catalogue import create, names

__all__ = ["create", "names"]
