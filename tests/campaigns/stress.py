"""Numbers under stress: unusual images, weights and sets give finite results or a clear message.

    python tests/campaigns/stress.py --long --out benchmarks/results/campaign_stress.json

The short form uses one detector, the long form all of them.
"""

import contextlib
import itertools
import logging
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping

import campaign
import numpy as np
import processes
from campaign import Options, Skipped
from PIL import Image

from fastflow_jax import Detector
from fastflow_jax.backbones import find_spec, porting
from fastflow_jax.config import default
from fastflow_jax.decision import p_values
from fastflow_jax.detectors.base import recipe
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.thresholds import image_threshold
from fastflow_jax.prediction import Prediction

SMALL = {
    "knn": {"knn.points": 20},
    "fastflow": {"flow.steps": 2, "flow.hidden_ratio": 0.5, "map.bank": 20},
    "gaussian": {},
    "subspace": {},
    "patchcore": {"patchcore.dimension": 8, "patchcore.max_points": 20},
    "spade": {},
    "cflow": {"cflow.steps": 1, "cflow.encoding": 8},
    "vae": {"vae.width": 2, "vae.latent": 4},
    "gan": {"gan.width": 2, "gan.latent": 4},
}
SIDE = 16
MORE = 256  # MiB of memory that ten times as many images may need
Images = list[np.ndarray]


def images(rng: np.random.Generator, n: int) -> Images:
    """Noise around a gradient, uint8 [20, 30, 3]."""
    ramp = np.linspace(60, 180, 30)[None, :, None]
    return list((ramp + rng.normal(0, 8, (n, 20, 30, 3))).clip(0, 255).astype(np.uint8))


def fitted(kind: str, given: Images, **fields) -> Detector:
    """A detector of pixels that trains in seconds."""
    c = default()
    c.update(recipe(kind))
    c.backbone, c.image_size, c.batch_size = "pixels", (SIDE,), 8
    c.update_from_flattened_dict(SMALL[kind] | fields)
    if kind in ("fastflow", "cflow", "vae", "gan"):
        c.train.epochs, c.train.batch_size = 1, 4
    return Detector.fit(given, config=c)


def detectors(options: Options) -> list[str]:
    """Kinds of detectors to try."""
    return list(SMALL)[: options.number(short=1, long=len(SMALL))]


def is_finite(result: Prediction) -> bool:
    """Whether all numbers of a result are."""
    numbers = [result.score, *([] if result.p_value is None else [result.p_value])]
    return bool(np.isfinite(numbers).all() and np.isfinite(result.anomaly_map).all())


def unusual_training_sets(rng: np.random.Generator) -> Mapping[str, Images]:
    """Training sets by name."""
    usual = images(rng, 12)
    column = np.zeros((17, 5000, 3), np.uint8)
    column[:, ::7] = 200
    return {
        "constant images": [np.full((20, 30, 3), 128 + i, np.uint8) for i in range(12)],
        "identical images": [usual[0]] * 12,
        "one image": usual[:1],
        "two images": usual[:2],
        "black images": [np.zeros((20, 30, 3), np.uint8)] * 12,
        "black images but one": [np.zeros((20, 30, 3), np.uint8)] * 11 + usual[:1],
        "saturated images": [np.full((20, 30, 3), 255, np.uint8)] * 12,
        "grey images": [image[:, :, 0] for image in usual],
        "16 bits": [image.astype(np.uint16) * 257 for image in usual],
        "one channel that varies": [image * np.uint8([1, 0, 0]) for image in usual],
        "extreme contrast": [((image > 120) * 255).astype(np.uint8) for image in usual],
        "17 x 5000 pixels": [np.roll(column, i, 1) for i in range(12)],
        "one pixel": [image[:1, :1] for image in usual],
        "images of any size": [image[: 4 + i, : 5 + i] for i, image in enumerate(usual)],
    }


def training_sets(options: Options) -> Iterator[str | None]:
    """Unusual training sets give finite scores, or a message."""
    rng = np.random.default_rng(options.seed)
    new = images(rng, 3)
    for kind, (name, given) in itertools.product(
        detectors(options), unusual_training_sets(rng).items()
    ):
        try:
            results = fitted(kind, given).predict(new)
        except InputError:
            yield None
            continue
        yield None if all(map(is_finite, results)) else f"{kind}, {name}: not finite"


def new_images(options: Options) -> Iterator[str | None]:
    """Unusual new images give finite scores, or a message."""
    rng = np.random.default_rng(options.seed)
    for kind in detectors(options):
        detector = fitted(kind, images(rng, 16))
        for name, given in unusual_training_sets(rng).items():
            try:
                results = detector.predict(given)
            except InputError:
                yield None
                continue
            yield None if all(map(is_finite, results)) else f"{kind}, {name}: not finite"


def weights(options: Options) -> Iterator[str | None]:
    """Weights with NaN, infinity, huge numbers or zeros give finite scores, or a message.

    Memory banks are float16, which features of large weights exceed.
    """
    rng = np.random.default_rng(options.seed)
    spec = find_spec("tf_efficientnet_lite0")
    slots = porting.slots(spec.module(("blocks.1",)), spec.image_size)
    usual = {name: rng.uniform(0.1, 0.5, slot.timm_shape) for name, slot in slots.items()}
    usual = {name: array.astype(np.float32) for name, array in usual.items()}
    changes = {
        "NaN": np.nan,
        "infinity": np.inf,
        "1e30": 1e30,
        "1e3": 1e3,
        "10": 10.0,
        "zeros": 0.0,
    }
    cases = list(itertools.product(changes.items(), (1, len(usual)), ("float32", "bfloat16")))
    for (name, value), part, dtype in cases[:: options.number(short=9, long=1)]:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "weights.npz")
            spoilt = dict.fromkeys(list(usual)[:part])
            changed = {k: np.full_like(v, value) if k in spoilt else v for k, v in usual.items()}
            np.savez(file, **changed)
            fields = {"backbone": "tf_efficientnet_lite0", "layers": ("blocks.1",)}
            fields |= {"feature_dtype": dtype, "weights": str(file)}
            try:
                detector = fitted("knn", images(rng, 12), **fields)
                results = detector.predict(images(rng, 2))
            except InputError:
                yield None
                continue
        yield (
            None if all(map(is_finite, results)) else f"{name}, {part} tensors, {dtype}: not finite"
        )


def batches(options: Options) -> Iterator[str | None]:
    """A score depends neither on the batch, nor on its order, nor on the other images.

    Sums in another order differ by a few units of float32. Where features are stored in 16 bits,
    one of them may be rounded to another neighbour, which is 2^-11 of its value away.
    """
    rng, types = np.random.default_rng(options.seed), ("float32", "float16")
    for kind, resize, dtype in itertools.product(detectors(options), ("square", "pad"), types):
        fields = {"data.resize": resize, "feature_dtype": dtype}
        detector = fitted(kind, images(rng, 16), **fields)
        for _ in range(options.number(short=2, long=10)):
            given = images(rng, int(rng.integers(2, 45)))
            order = rng.permutation(len(given))
            known = np.array([r.score for r in detector.predict(given)])
            turned = np.array([r.score for r in detector.predict([given[i] for i in order])])
            some = order[:3]
            alone = np.array([detector.predict(given[i]).score for i in some])
            errors = np.append(np.abs(turned - known[order]), np.abs(alone - known[some]))
            error = errors.max() / np.abs(known).max()
            about = f"{kind}, {resize}, {dtype}, {len(given)} images: scores differ by {error:.1e}"
            yield None if error <= 1e-5 else about


def thresholds(options: Options) -> Iterator[str | None]:
    """Thresholds fall with the rate; copies of held-out images do not change them or the order."""
    rng = np.random.default_rng(options.seed)
    for _ in range(options.number(short=50, long=1000)):
        scores = rng.choice([rng.exponential, rng.normal])(size=int(rng.integers(20, 200)))
        rates = np.sort(rng.uniform(1 / 19, 1, 5))
        found = [image_threshold(scores, rate, warn=False).value for rate in rates]
        new = rng.normal(size=50)
        p, twice = (p_values(new, np.tile(scores, n)) for n in (1, 2))
        falls = (np.diff(found) <= 0).all() and (np.diff(p[np.argsort(new)]) <= 0).all()
        same_order = (np.argsort(p, kind="stable") == np.argsort(twice, kind="stable")).all()
        yield None if falls and same_order else f"{len(scores)} scores: {found}"


def p_values_are_uniform(options: Options) -> Iterator[str | None]:
    """Of exchangeable scores, at most a share `a` of p-values is up to `a`, in 1,000 draws."""
    rng = np.random.default_rng(options.seed)
    for n in (5, 19, 60)[: options.number(short=1, long=3)]:
        draws = rng.gamma(2.0, size=(1000, n + 1))
        p = np.array([p_values(np.float64(row[0]), row[1:]) for row in draws])
        levels = np.arange(1, n + 1) / (n + 1)
        shares = (p[:, None] <= levels + 1e-9).mean(0)
        error = 4 * np.sqrt(levels * (1 - levels) / len(draws))
        yield None if (np.abs(shares - levels) <= error).all() else f"n = {n}: {shares}"


def many_images(options: Options) -> Iterator[str | None]:
    """Ten times as many training images, up to 20,000, need no more memory."""
    if not options.long:
        raise Skipped("it takes minutes")
    peaks = {n: _peak(options.folder / str(n), n) for n in (2000, 20_000)}
    options.figures["peak_mib"] = peaks
    few, many = peaks.values()
    found = many - few <= MORE
    yield None if found else f"{few} MiB, and {many} MiB for ten times as many images"


def _peak(folder: pathlib.Path, n: int) -> int:
    """Highest memory in MiB of a training on n images, with features on disk.

    Pages of the mapped features do not count, because the system can drop them at any time.
    """
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for i in range(n):
        pixels = rng.integers(100, 140, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"images/{i:05}.png")
    words = ["train", "--config=folder", f"--config.data.root={folder / 'images'}"]
    words += ["--config.image_size=64", "--config.train.cache=disk", f"--workdir={folder / 'run'}"]
    command, peak = processes.start(words, folder / "log"), 0
    status = pathlib.Path(f"/proc/{command.process.pid}/status")
    while command.is_running:
        with contextlib.suppress(OSError):  # it has just ended
            found = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status.read_text(), re.MULTILINE)
            peak = max(peak, sum(map(int, found)))
        time.sleep(0.05)
    if command.status() != 0:
        raise RuntimeError(command.text[-500:])
    return peak >> 10


TRIALS = {
    "training on unusual images": training_sets,
    "prediction of unusual images": new_images,
    "damaged weights of a backbone": weights,
    "batches of any size and order": batches,
    "thresholds: order and copies": thresholds,
    "p-values of exchangeable scores": p_values_are_uniform,
    "20,000 training images: memory": many_images,
}

if __name__ == "__main__":
    logging.getLogger("fastflow_jax").setLevel(logging.ERROR)  # images are unusual throughout
    sys.exit(campaign.main(__doc__, TRIALS, data="synthetic images of 20 x 30 pixels"))
