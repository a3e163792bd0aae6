"""Networks by name: built in for images of about 32x32, from torchvision, timm and transformers, or the user's own."""

from .attention import with_plain_attention
from .catalogue import create, is_trained, names, random_texts
from .huggingface import check_tokenizer
from .weights import load_weights

__all__ = ["check_tokenizer", "create", "is_trained", "load_weights", "names", "random_texts", "with_plain_attention"]
