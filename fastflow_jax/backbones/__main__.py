"""Prints the backbones there are: python -m fastflow_jax.backbones."""

from fastflow_jax.backbones import listing

print(listing())
