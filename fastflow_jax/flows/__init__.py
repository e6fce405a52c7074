"""Normalising-flow layers for any Flax model.

Every layer is a linen module:

    y, log_det = layer(x)                  # x and y [..., C], log_det [...]
    x, log_det = layer(y, inverse=True)    # exact inverse; log_det has the opposite sign

`log_det` is the log-determinant **per location**; summed over the locations, it is that of the
whole feature map. `flows.nnx` has the same layers for Flax NNX. This package imports only jax and
flax.
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
