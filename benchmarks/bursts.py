"""Whether stated false-alarm rates hold for new parts if each part is photographed several times.

python benchmarks/bursts.py --data=elpv/mono
python benchmarks/bursts.py --root=FOLDER/train/good --draws=3

Each draw takes other parts at random, photographs each of them several times (moved by up to a
pixel, with noise of two grey levels), fits a detector on these, once without and once with
`groups=`, and counts how many photographs of new parts are flagged.
"""

import argparse
import pathlib

import numpy as np

from fastflow_jax import Detector
from fastflow_jax.config import default, name_data
from fastflow_jax.data import open_dataset

PARTS, SHOTS, NEW, RATES = 60, 4, 150, (0.1, 0.2, 0.3)


def shot(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another photograph of the part in an image."""
    moved = np.roll(image, rng.integers(-1, 2, 2), (0, 1))
    return np.clip(moved + rng.normal(0, 2, image.shape), 0, 255).round().astype(np.uint8)


def flagged(images: list, new: list, groups: np.ndarray | None, steps: int) -> list[float]:
    """The share of new images above the threshold for each of `RATES`."""
    config = default()
    config.train.steps, config.data.holdout = steps, 0.25
    detector = Detector.fit(images, config=config, groups=groups)
    scores = np.array([result.score for result in detector.stream(new)])
    limits = [detector.with_threshold(rate=rate).image_threshold.value for rate in RATES]
    return [float(np.mean(scores > limit)) for limit in limits]


def main() -> None:
    """Print a row per way of holding out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="a data set, such as elpv/mono")
    parser.add_argument("--root", type=pathlib.Path, help="a directory of normal images")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    config = default()
    if arguments.data:
        name_data(config, arguments.data)
    else:
        config.data.root = str(arguments.root)
    parts = open_dataset(config.data).train
    found = {"images": [], "groups": []}
    for draw in range(arguments.draws):
        rng = np.random.default_rng(draw)
        chosen = rng.permutation(len(parts))
        pictures = {int(i): parts[int(i)].image for i in chosen[: PARTS + NEW]}
        images = [shot(pictures[int(i)], rng) for i in np.repeat(chosen[:PARTS], SHOTS)]
        new = [shot(pictures[int(i)], rng) for i in chosen[PARTS : PARTS + NEW]]
        groups = np.arange(PARTS).repeat(SHOTS)
        for name, given in (("images", None), ("groups", groups)):
            found[name].append(flagged(images, new, given, arguments.steps))
            print(f"draw {draw}, held out by {name}: {found[name][-1]}", flush=True)
    print(f"{'held out by':<12}" + "".join(f"{f'asked {rate}':>12}" for rate in RATES))
    for name, rows in found.items():
        print(f"{name:<12}" + "".join(f"{share:12.3f}" for share in np.mean(rows, 0)))


if __name__ == "__main__":
    main()
