"""Exact surgery on copies, without data or training: cut a slice out, mask what is outside of it, widen."""
