"""Normalising-flow layers for any Flax model.

Every layer is a linen module with one contract:

    y, log_det = layer(x)                  # forward, x and y [..., C], log_det [...]
    x, log_det = layer(y, inverse=True)    # exact inverse, log_det with the opposite sign

`log_det` is the log-determinant **per location**: its sum over the locations is that of the whole
map, and the map itself is what a likelihood map needs. `flows.nnx` has the same layers for Flax
NNX. This package imports jax and flax only.
"""

from fastflow_jax.flows.chain import Flow, FlowStep
from fastflow_jax.flows.coupling import AffineCoupling, ConvSubnet, affine_coupling
from fastflow_jax.flows.elementwise import GlobalAffine
from fastflow_jax.flows.permute import Permute, permute

__all__ = [
    "AffineCoupling",
    "ConvSubnet",
    "Flow",
    "FlowStep",
    "GlobalAffine",
    "Permute",
    "affine_coupling",
    "permute",
]
