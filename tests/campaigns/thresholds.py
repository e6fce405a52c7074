"""Whether thresholds keep their promise: random splits of the normal images of real data sets.

    python tests/campaigns/thresholds.py --sets photos/screws elpv/mono \
        --out benchmarks/results/thresholds.json
    python tests/campaigns/thresholds.py --sets photos/screws elpv/mono --shift \
        --out benchmarks/results/thresholds_shift.json

A detector (k-NN) is trained on half of the training images of a set. The other half and the normal
test images are a pool. Each split draws held-out images from the pool, calibrates on them, sets
thresholds, and counts alarms among the other images of the pool. With --apart, normal test images
are not in the pool, because they show other parts or another material than the training images.

- **images**: the threshold is the k-th lowest of n held-out scores. The number of alarms among m
  new images then has a beta-binomial distribution, whatever the distribution of scores. A split is
  inside if the number is in the central 95 % of that distribution.
- **tiles**: the same for images that are cut into tiles, and their whole scores.
- **pixels**: a split is inside if the share of pixels above the threshold, within the error of its
  own sample, is in the interval of the threshold.
- **after an update**: each split draws images of another exposure from the pool, teaches them by
  `Detector.update`, and counts alarms among other images of that exposure. There are at most
  as many alarms as in the upper half of the central range.

"Promised" is the probability to be inside. A set is lost if a binomial test over its splits finds
fewer inside than promised, at the level of .001. With --shift, the assumption is broken on purpose:
the rows count how often the test for a shift warns.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import scipy

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
from many_sets import configuration, find_sets
from outcome import commit, describe_machine, versions, write_result
from tqdm import tqdm

from fastflow_jax import Detector
from fastflow_jax.data import open_dataset
from fastflow_jax.decision import Threshold
from fastflow_jax.evaluation.held_out import score_location_maps
from fastflow_jax.evaluation.thresholds import default_rate
from fastflow_jax.features.extract import in_batches
from fastflow_jax.features.prepare import preparer
from fastflow_jax.runs.fit import fit

COLUMNS = {
    **{"set": "data set", "what": "statement", "n": "held out", "splits": "splits"},
    **{"promised": "promised inside", "inside": "inside"},
    **{"rate": "stated rate", "alarms": "mean rate of alarms", "lost": "lost"},
}
SHIFT_COLUMNS = {"set": "data set", "what": "new images", "images": "images in a draw"}
SHIFT_COLUMNS |= {"draws": "draws", "warned": "share of draws with a warning"}
_CONFIDENCE, _LEVEL = 0.95, 1e-3  # of intervals; of the binomial test
_TILES = {"data.tile": 128, "data.resolution": 256}
_UPDATED = {"image_size": (128,)}  # of updates, and of the test for a shift
_MOST = 150  # new images of a split


@dataclasses.dataclass(frozen=True)
class Split:
    """Outcome of a split."""

    inside: bool
    promised: float  # probability to be inside
    rate: float  # stated
    alarms: float  # share of new images or pixels


def image_split(threshold: Threshold, scores: np.ndarray, *, upper_only: bool = False) -> Split:
    """Alarms among the scores [m] of new normal images, for a threshold of n held-out ones."""
    n, rate = threshold.n, threshold.rate
    low, high, promised = _range(len(scores), n, rate, upper_only)
    alarms = int((scores > threshold.value).sum())
    return Split(low <= alarms <= high, promised, rate, alarms / len(scores))


@functools.cache
def _range(m: int, n: int, rate: float, upper_only: bool) -> tuple[int, int, float]:
    """Fewest and most alarms among m new images that are inside, and their probability."""
    k = min(n, max(1, math.ceil(round((n + 1) * (1 - rate), 9))))
    law = scipy.stats.betabinom(m, n + 1 - k, k)
    tail = (1 - _CONFIDENCE) / 2
    low, high = 0 if upper_only else int(law.ppf(tail)), int(law.ppf(1 - tail))
    return low, high, float(law.cdf(high) - law.cdf(low - 1))


def pixel_split(threshold: Threshold, maps: Iterable[np.ndarray]) -> Split:
    """Pixels above the threshold in the anomaly maps [H, W] of new normal images."""
    shares = np.array([(anomaly_map > threshold.value).mean() for anomaly_map in maps])
    error = scipy.stats.norm.ppf((1 + _CONFIDENCE) / 2) * shares.std(ddof=1) / len(shares) ** 0.5
    low, high = threshold.interval
    inside = low - error <= shares.mean() <= high + error
    return Split(inside, _CONFIDENCE, threshold.rate, shares.mean())


@dataclasses.dataclass(frozen=True)
class Pool:
    """Location maps of normal images, and the scorer that is calibrated on some of them."""

    scorer: Any
    maps: tuple[np.ndarray, ...]  # [N, h, w] per map, of images or of tiles
    tiles: Any  # of the images; None without tiles

    def __len__(self) -> int:
        return len(self.maps[0]) if self.tiles is None else len(self.tiles.sizes)

    def splits(self, number: int, rng: np.random.Generator) -> Iterator[tuple[Split, Split]]:
        """Yields the statements on images and on pixels for random splits."""
        n = round(0.3 * len(self))
        for _ in range(number):
            order = rng.permutation(len(self))
            held, new = np.sort(order[:n]), np.sort(order[n : n + _MOST])
            maps, tiles = self._of(held)
            found = score_location_maps(self.scorer, maps, tiles=tiles)
            scorer = self.scorer.recalibrated(maps)
            scores, shown = self._score(scorer, *self._of(new))
            image = found.image_threshold(default_rate(n))
            yield image_split(image, scores), pixel_split(found.pixel_threshold(0.01), shown)

    def _of(self, images: np.ndarray) -> tuple[tuple[np.ndarray, ...], Any]:
        """Location maps and tiles of some images."""
        if self.tiles is None:
            return tuple(m[images] for m in self.maps), None
        rows = self.tiles.rows(images)
        sizes, places = (
            tuple(each[i] for i in images) for each in (self.tiles.sizes, self.tiles.places)
        )
        return tuple(m[rows] for m in self.maps), dataclasses.replace(
            self.tiles, sizes=sizes, places=places
        )

    @staticmethod
    def _score(scorer: Any, maps: tuple[np.ndarray, ...], tiles: Any) -> tuple:
        """Scores [m] and anomaly maps [H, W] of m images."""
        scored = [
            scorer.score_maps(tuple(m[i : i + 32] for m in maps))
            for i in range(0, len(maps[0]), 32)
        ]
        if tiles is None:
            return tuple(np.concatenate(each) for each in zip(*scored, strict=True))
        whole = tiles.whole(range(len(maps[0])), scored)
        scores, shown = zip(*((w.score, w.anomaly_map) for w in whole), strict=True)
        return np.array(scores), shown


def pool_of(fields: dict, folder: pathlib.Path, *, apart: bool) -> Pool:
    """Trains a detector on half of the training images of a set."""
    config = configuration("knn", {**fields, "data.holdout": 0.5})
    prepared = preparer(config, folder / "features")(config, config.data.category, 0)
    scorer = fit(config, prepared, seed=0, directory=folder / "training", label="pool").scorer
    maps = in_batches(
        lambda part: scorer.location_maps(*part), (prepared.holdout, prepared.holdout_valid), 32
    )
    if apart or prepared.holdout_tiles is not None:
        return Pool(scorer, maps, prepared.holdout_tiles)
    good = np.flatnonzero(prepared.dataset.test.labels == 0)
    batches = [scorer.location_maps(b.features, b.valid) for b in prepared.test(good)]
    both = (np.concatenate([m, *own]) for m, *own in zip(maps, *batches, strict=True))
    return Pool(scorer, tuple(both), None)


def exposed(image: np.ndarray) -> np.ndarray:
    """The image at a shorter exposure."""
    return np.round(image * 0.8).astype(np.uint8)


def updates(fields: dict, number: int, rng: np.random.Generator) -> tuple[int, Iterator[Split]]:
    """The number of taught images, and the statement on others of their exposure for each split."""
    config = configuration("knn", {**fields, **_UPDATED})
    images = [example.image for example in open_dataset(config.data).train]
    half = len(images) // 2
    detector = Detector.fit(images[:half], config=config)
    new = [exposed(image) for image in images[half:]]
    n = min(40, len(new) // 2)

    def splits() -> Iterator[Split]:
        for _ in range(number):
            order = rng.permutation(len(new))
            taught = detector.update([new[i] for i in order[:n]])
            scores = [result.score for result in taught.stream([new[i] for i in order[n : n + 60]])]
            threshold = dataclasses.replace(taught.image_threshold, n=n)
            yield image_split(threshold, np.array(scores), upper_only=True)

    return n, splits()


def row(name: str, what: str, n: int, splits: list[Split]) -> dict[str, Any]:
    """The row of a table, see the top of this file."""
    inside, promised = (np.array([getattr(s, of) for s in splits]) for of in ("inside", "promised"))
    test = scipy.stats.binomtest(int(inside.sum()), len(inside), promised.mean(), "less")
    return {
        **{"set": name, "what": what, "n": n, "splits": len(splits)},
        "promised": round(float(promised.mean()), 3),
        "inside": round(float(inside.mean()), 3),
        "rate": round(splits[0].rate, 3),
        "alarms": round(float(np.mean([s.alarms for s in splits])), 3),
        "lost": int(test.pvalue < _LEVEL),
    }


def warnings_of(
    name: str, fields: dict, number: int, rng: np.random.Generator, *, apart: bool
) -> Iterator[dict[str, Any]]:
    """Yields, for each kind of normal images, the share of draws with a warning of a shift.

    The detector is trained on the left half of each image of a half of the training images, chosen
    at random. Kinds with too few images for the test are left out.
    """
    config = configuration("knn", {**fields, **_UPDATED})
    dataset = open_dataset(config.data)
    train = [dataset.train[int(i)].image for i in rng.permutation(len(dataset.train))]
    half, middle = len(train) // 2, train[0].shape[1] // 2
    detector = Detector.fit([image[:, :middle] for image in train[:half]], config=config)
    kinds = {
        "the same half of other images": [image[:, :middle] for image in train[half:]],
        "the other half of other images": [image[:, middle:] for image in train[half:]],
        "the same half at another exposure": [exposed(i[:, :middle]) for i in train[half:]],
    }
    if apart:
        good = np.flatnonzero(dataset.test.labels == 0)
        kinds["other parts"] = [dataset.test[int(i)].image[:, :middle] for i in good]
    for kind, images in kinds.items():
        distances = [result.distance for result in detector.stream(images[:200])]
        n = min(60, len(distances))
        drawn = (rng.choice(distances, n, False) for _ in range(number))
        found = [detector.find_shift(dict(enumerate(draw))) for draw in drawn]
        if None in found:
            continue
        share = float(np.mean([bool(each.message) for each in found]))
        yield {
            **{"set": name, "what": kind, "images": n},
            **{"draws": number, "warned": round(share, 3)},
        }


def statements(
    name: str, fields: dict, number: int, rng: np.random.Generator, *, apart: bool
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a set."""
    for what, changed in {"image": {}, "tile": _TILES}.items():
        with tempfile.TemporaryDirectory() as folder:
            pool = pool_of(fields | changed, pathlib.Path(folder), apart=apart)
        n, shown = round(0.3 * len(pool)), number if what == "image" else number // 4
        found = list(tqdm(pool.splits(shown, rng), f"{name}, {what}s", shown, leave=False))
        of_images, of_pixels = (list(each) for each in zip(*found, strict=True))
        word = "whole images" if what == "image" else "images of tiles"
        yield row(name, word, n, of_images)
        yield row(name, f"pixels of {word}", n, of_pixels)
    n, splits = updates(fields, number // 4, rng)
    found = list(tqdm(splits, f"{name}, updates", number // 4, leave=False))
    yield row(name, "images after an update", n, found)


def main() -> int:
    """Runs the campaign; returns 1 if a promise was not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", required=True, help="Data sets, or directories.")
    parser.add_argument("--apart", nargs="*", default=[], help="Names of sets, see above.")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--shift", action="store_true", help="Count warnings of a shift instead.")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    about = {
        "page": "docs/trust.md",
        "command": f"python tests/campaigns/thresholds.py {' '.join(sys.argv[1:])}",
        "commit": commit(),
        "machine": describe_machine(),
        "versions": versions("jax", "numpy", "scipy"),
        "seeds": "0",
        "data": "normal images of each set; ELPV mono is public, the others were given",
        "columns": SHIFT_COLUMNS if args.shift else COLUMNS,
    }
    rows = []
    for name, fields in find_sets(args.sets).items():
        what = name, fields, args.splits, np.random.default_rng(0)
        for each in (warnings_of if args.shift else statements)(*what, apart=name in args.apart):
            rows.append(each)
            print(*each.values(), sep=" | ", flush=True)
            write_result(args.out, about | {"rows": rows})
    return int(any(each.get("lost") for each in rows))


if __name__ == "__main__":
    sys.exit(main())
