"""A flow step equals FrEIA's AllInOneBlock: output, log-det, inverse and gradients."""

import pathlib
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastflow_jax import flows

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
sys.path.insert(0, str(GOLDENS))
from make_freia import CASES, oracle  # noqa: E402


def expected(case, source):
    if source == "golden":
        with np.load(GOLDENS / "freia.npz") as file:
            return {k.split("/")[1]: file[k] for k in file.files if k.startswith(f"{case}/")}
    pytest.importorskip("torch", reason="FrEIA runs in torch")
    pytest.importorskip("FrEIA", reason="pip install freia==0.2")
    return oracle(*CASES[case])


@pytest.mark.parametrize("source", ["golden", "live"])
@pytest.mark.parametrize("case", CASES)
def test_step_equals_freia(case, source):
    want = expected(case, source)
    *_, kernel, ratio = CASES[case]
    step = flows.FlowStep(kernel_size=kernel, hidden_ratio=ratio)
    subnet = {
        name: {part: jnp.asarray(want[f"param_{name}_{part}"]) for part in ("kernel", "bias")}
        for name in ("conv_in", "conv_out")
    }
    affine = {name: jnp.asarray(want[f"param_{name}"]) for name in ("scale", "offset")}
    params = {"coupling": {"subnet": subnet}, "affine": affine}
    permutations = {"permute": {"index": jnp.asarray(want["index"], jnp.int32)}}

    @partial(jax.jit, static_argnames="inverse")
    def run(params, x, inverse=False):
        variables = {"params": params, "permutations": permutations}
        return step.apply(variables, x, inverse=inverse)

    def loss(params, x):
        z, log_det = run(params, x)
        return 0.5 * jnp.sum(z**2) - log_det.sum()

    y, log_det = run(params, want["x"])
    np.testing.assert_allclose(y, want["y"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(log_det.sum((1, 2)), want["log_det"], atol=1e-4, rtol=1e-5)
    back, _ = run(params, want["y"], inverse=True)
    np.testing.assert_allclose(back, want["back"], atol=1e-5, rtol=1e-5)

    grads, grad_x = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(want["x"]))
    np.testing.assert_allclose(grad_x, want["grad_x"], atol=1e-4, rtol=1e-5)
    for name, parts in grads["coupling"]["subnet"].items():
        for part, value in parts.items():
            np.testing.assert_allclose(
                value, want[f"grad_{name}_{part}"], rtol=1e-5, atol=1e-4, err_msg=name
            )
    for name, value in grads["affine"].items():
        np.testing.assert_allclose(value, want[f"grad_{name}"], rtol=1e-5, atol=1e-4)
