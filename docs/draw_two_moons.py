"""Draws two_moons.png, the figure of flows.md, by running the code of that page.

python docs/draw_two_moons.py
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

PAGE = pathlib.Path(__file__).with_name("flows.md")
SIDE = 2.2  # half the side of the plotted square


def main() -> None:
    """Plots points, density and samples side by side."""
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[:2]:
        exec(code, names)
    ticks = jnp.linspace(-SIDE, SIDE, 300)
    plane = jnp.stack(jnp.meshgrid(ticks, ticks), axis=-1).reshape(-1, 1, 1, 2)
    density = np.exp(jax.jit(names["log_likelihood"])(names["params"], plane)).reshape(300, 300)

    _, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    dots = {"s": 3, "alpha": 0.5, "linewidths": 0, "color": "#5b2a86"}
    axes[0].scatter(*names["points"][:2048].T, **dots)
    axes[1].imshow(density, "inferno", origin="lower", extent=(-SIDE, SIDE, -SIDE, SIDE))
    axes[2].scatter(*np.asarray(names["samples"]).reshape(-1, 2).T, **dots)
    for axis, title in zip(axes, ("points", "density", "samples"), strict=True):
        axis.set(title=title, xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE), aspect="equal")
        axis.set(xticks=[], yticks=[])
    plt.savefig(PAGE.with_name("two_moons.png"), dpi=100)


if __name__ == "__main__":
    main()
