"""Prints a table of the backbones: python -m fastflow_jax.backbones."""

from fastflow_jax.backbones import listing

print(listing())
