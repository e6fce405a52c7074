"""The picture of accuracy against time."""

import pytest
from PIL import Image

from fastflow_jax.report.tradeoff import save_tradeoff


def results(pixel=0.8, std=None):
    rows = {"fastflow": (0.95, 4.0), "patchcore": (0.93, 40.0)}
    return {
        "variants": {
            name: {
                "mean": {"image_auroc": figure, "pixel_auroc": pixel},
                "std": std,
                "speed": {"ms_batch_1": ms},
            }
            for name, (figure, ms) in rows.items()
        }
    }


def test_what_was_not_measured_is_left_out(tmp_path):
    some, one = results(), {"variants": {"patchcore": results()["variants"]["patchcore"]}}
    some["variants"]["fastflow"]["speed"] = None
    save_tradeoff(some, tmp_path / "some.png")
    save_tradeoff(one, tmp_path / "1.png")
    assert (tmp_path / "some.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    some["variants"]["patchcore"]["speed"] = None
    for nothing in (some, {"variants": None}):
        save_tradeoff(nothing, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("std", [None, {"image_auroc": 0.01, "pixel_auroc": 0.02}])
def test_a_panel_for_each_metric_that_there_is(tmp_path, std):
    save_tradeoff(results(std=std), tmp_path / "two.png")
    save_tradeoff(results(pixel=None, std=std), tmp_path / "one.png")
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.width == 2 * one.width
        assert two.height == one.height
        colours = one.convert("RGB").getcolors(1 << 20)
    assert len([c for n, c in colours if n > 20 and max(c) - min(c) > 60]) >= 2  # one a detector
