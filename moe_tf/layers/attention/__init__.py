"""Attention layers: dot-product with many heads, and additive."""
