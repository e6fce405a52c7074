"""Draws heatmaps.png, the figure of the README, from the heat maps of a run.

python -m fastflow_jax.main --config=configs/synthetic.py:brick,gravel --config.heatmaps=200 \
    --workdir=runs/synthetic
python docs/draw_heatmaps.py runs/synthetic
"""

import pathlib
import sys

from PIL import Image

from fastflow_jax.report.heatmaps import save_picture, stack_pictures

# One of each kind of defect, and a second crack.
SHOWN = ("brick/crack/066", "gravel/crack/060", "brick/stain/034", "gravel/patch/059")


def main(run: pathlib.Path) -> None:
    """Arranges four heat maps in two columns."""
    pictures = [
        Image.open(run / f"{category}/heatmaps/{kind}/{name}.png")
        for category, kind, name in (shown.split("/") for shown in SHOWN)
    ]
    sheet = stack_pictures(pictures, columns=2)
    save_picture(pathlib.Path(__file__).with_name("heatmaps.png"), sheet)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
