"""Draws page.png: the page of the server, in Chromium.

The images are bricks of scikit-image (CC0) with painted defects.

    python -m fastflow_jax.main --config=configs/knn.py:synthetic/brick --workdir=runs/bricks
    PYTHONPATH=tests python docs/draw_page.py runs/bricks
"""

import io
import pathlib
import re
import subprocess
import sys
import tempfile

import chromium
from PIL import Image

from fastflow_jax.data.synthetic import paint_dataset

SHOWN = ("good/002", "stain/031", "crack/024", "good/004", "patch/026", "crack/027", "good/009")
SELECTED = "stain/031"
SCORED = "results.length && results.every(({ state }) => state === 'done')"
WIDTH, HEIGHT = 1280, 940


def name_of(shown: str) -> str:
    """The file of an image of the data set."""
    return f"{shown.replace('/', '_')}.png"


def write_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the images that are shown."""
    known = {example.name: example.image for example in paint_dataset("brick").test}
    files = [folder / name_of(shown) for shown in SHOWN]
    for shown, file in zip(SHOWN, files, strict=True):
        Image.fromarray(known[f"{shown}.png"]).save(file)
    return files


def draw(port: int, folder: pathlib.Path) -> Image.Image:
    """Returns a picture of the page, after it has scored the images."""
    with chromium.page(folder / "profile") as page:
        page.size(WIDTH, HEIGHT)
        page.call("Emulation.setScrollbarsHidden", hidden=True)
        page.open(f"http://127.0.0.1:{port}/")
        page.choose("#files", write_images(folder))
        page.run(
            f"new Promise(done => {{ const look = () => {SCORED} ? done() : setTimeout(look, 50);"
            " look(); })"
        )
        page.run(f"select(results.find(({{ name }}) => name === '{name_of(SELECTED)}'))")
        page.settle()
        return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def main(run: pathlib.Path) -> None:
    """Serves a run, and draws the page."""
    command = [sys.executable, "-m", "fastflow_jax.main", "--mode=serve", "--port=0"]
    with tempfile.TemporaryDirectory() as folder:
        marked = f"--false_alarms={folder}/marked"
        server = subprocess.Popen(
            [*command, f"--workdir={run}", marked], stderr=subprocess.PIPE, text=True
        )
        try:
            assert server.stderr is not None
            log = (re.search(r"at http://127\.0\.0\.1:(\d+)", line) for line in server.stderr)
            port = int(next(filter(None, log))[1])
            picture = draw(port, pathlib.Path(folder))
        finally:
            server.terminate()
            server.wait()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        pathlib.Path(__file__).with_name("page.png"), optimize=True
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
