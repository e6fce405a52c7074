"""Contrast of the colours of all pages, by WCAG 2.2 (criteria 1.4.3 and 1.4.11)."""

import re
from importlib.resources import files

import numpy as np
import pytest

_CSS = (files("fastflow_jax") / "report" / "theme.css").read_text()
_TEXT = ("ink", "faint", "normal", "anomalous", "good", "bad")


def _colours(scheme):
    """RGB of each colour by name, in [0, 1]."""
    light, dark = re.findall(r":root \{(.*?)\}", _CSS, re.DOTALL)
    found = {}
    for block in (light, dark)[: 1 + (scheme == "dark")]:
        for name, digits in re.findall(r"--(\w+): #(\w+)", block):
            digits = digits if len(digits) == 6 else "".join(2 * d for d in digits)
            found[name] = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return found


def _contrast(a, b):
    linear = (np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in (a, b))
    low, high = sorted(float(c @ [0.2126, 0.7152, 0.0722]) for c in linear)
    return (high + 0.05) / (low + 0.05)


def test_black_on_white_has_the_contrast_of_the_standard():
    assert _contrast(np.zeros(3), np.ones(3)) == pytest.approx(21)
    grey = np.full(3, 0x76 / 255)  # the lightest grey that is legible on white
    assert _contrast(grey, np.ones(3)) == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("ground", ["paper", "card"])
def test_texts_and_controls_are_legible(scheme, ground):
    colours = _colours(scheme)
    plain = colours[ground]
    selected = 0.08 * colours["ink"] + 0.92 * plain  # of a selected row of the server's page
    for name in _TEXT:
        assert min(_contrast(colours[name], each) for each in (plain, selected)) >= 4.5, name
    for name in ("edge", "focus"):
        assert _contrast(colours[name], plain) >= 3, name
