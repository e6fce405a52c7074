"""Scores of the test images of a detector, and their metrics."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from fastflow_jax.data.dataset import Regions
from fastflow_jax.data.tiles import Tiles
from fastflow_jax.data.tiling import Places
from fastflow_jax.evaluation import kinds, overlap, ranking
from fastflow_jax.evaluation.metrics import overlap_weights
from fastflow_jax.features.extract import FeatureBatch

# Called with images [B, H, W, 3], or the features that a detector takes instead, and, if there is
# padding, the padding mask [B, H, W]. Returns image scores [B] and anomaly maps [B, H, W].
Score = Callable[..., tuple[np.ndarray, np.ndarray]]

# Area under the region overlap up to a false-positive rate.
_AREAS = {"aupro": 0.3, "aupro_10": 0.1, "aupro_05": 0.05}
_SPRO_LIMIT = 0.05
# docs/metrics.md defines them.
METRICS = (
    *("image_auroc", "pixel_auroc", *_AREAS, "image_f1", "image_ap"),
    *("pixel_ap", "pixel_f1", "seg_f1", "aupimo", "spro_05"),
)
_IN_MEMORY = 1 << 30  # bytes of an array; larger ones are memory maps


class Scored(NamedTuple):
    """Scores of N images, in the order of the source; higher is more anomalous.

    Anomaly maps are kept only if there are masks: they are large and serve pixel metrics alone.
    Arrays above 1 GiB are memory maps of temporary files.
    """

    scores: np.ndarray  # float32 [N]
    labels: np.ndarray  # int32 [N], 1 for defective images
    maps: np.ndarray | None  # float32 [N, H, W]; None without masks
    # bool [N, H, W], True in defects, of pixels that count; None without masks
    masks: np.ndarray | None
    # bool [N, H, W], False in padding and outside of the region of interest; None if all count
    valid: np.ndarray | None
    # index -> regions of the image at the size of its map; None if the data set defines none
    regions: Callable[[int], Regions] | None = None


class Limits(NamedTuple):
    """Thresholds of a detector; None if it has none."""

    image: float | None = None  # of image scores
    pixel: float | None = None  # of anomaly maps


@dataclasses.dataclass(frozen=True)
class Details:
    """Metrics of parts of the test images, JSON-able."""

    kinds: list[dict[str, Any]]  # `kinds.by_kind`, with "aupimo" and "spro_05", or None
    sizes: list[dict[str, Any]]  # `overlap.recall_by_size`; empty without a pixel threshold
    aupimo: list[float | None] | None  # of each image; None in images without defective pixels


def score_split(score: Score, batches: Iterable[FeatureBatch], n: int, *, progress: str) -> Scored:
    """Scores each image of a split once.

    Args:
      score: scores one batch.
      batches: at least one.
      n: number of images.
      progress: label of the progress bar.
    """
    names = ("scores", "labels", "maps", "masks", "valid")
    arrays: dict[str, np.ndarray | None] = dict.fromkeys(names)
    start = 0
    with tqdm(total=n, desc=progress, unit="img", leave=False, dynamic_ncols=True) as bar:
        for batch in batches:
            padding = () if batch.valid is None else (batch.valid,)
            scores, maps = score(batch.features, *padding)
            mask, valid = batch.mask, batch.valid
            maps = None if mask is None else maps
            mask = mask if mask is None or valid is None else mask & valid
            end = start + len(batch.label)
            parts = (scores, batch.label, maps, mask, valid)
            for name, part in zip(names, parts, strict=True):
                if part is not None:
                    whole = arrays[name]
                    if whole is None:
                        whole = arrays[name] = _empty((n, *part.shape[1:]), part.dtype)
                    whole[start:end] = part
            start = end
            bar.update(len(batch.label))
    return Scored(**arrays)  # pyright: ignore[reportArgumentType]


def score_tiles(
    score: Score,
    batches: Iterable[FeatureBatch],
    tiles: Tiles,
    statistics: Places | None = None,
    *,
    progress: str,
) -> Scored:
    """Scores each image of a split once, from its tiles.

    Masks are read again, at the resolution of the tiles. If the images differ in size, maps and
    masks are padded to the largest height and width.

    Args:
      score: scores one batch of tiles.
      batches: of all tiles, in order.
      tiles: of the images.
      statistics: see `Tiles.whole`.
      progress: label of the progress bar.
    """
    images, n, canvas = tiles.images, len(tiles.sizes), tiles.canvas
    has_masks, is_padded = images[0].mask is not None, len(set(tiles.sizes)) > 1
    scores = np.empty(n, np.float32)
    maps = _empty((n, *canvas), np.float32) if has_masks else None
    masks = _empty((n, *canvas), bool) if has_masks else None
    valid = _empty((n, *canvas), bool) if is_padded and has_masks else None
    scored = (score(b.features, *(() if b.valid is None else (b.valid,))) for b in batches)
    with tqdm(total=n, desc=progress, unit="img", leave=False, dynamic_ncols=True) as bar:
        rows = np.arange(len(tiles.image))
        for i, image_score, anomaly_map in tiles.whole(rows, scored, statistics):
            scores[i] = image_score
            if maps is not None and masks is not None:
                maps[i] = tiles.on_canvas(i, anomaly_map)
                masks[i] = tiles.on_canvas(i, np.asarray(images[i].mask))
            if valid is not None:
                valid[i] = tiles.on_canvas(i, np.ones(tiles.sizes[i], bool))
            bar.update()
    regions = images.regions

    def padded_regions(i: int) -> Regions:
        assert regions is not None
        found = regions(i)
        return found._replace(masks=tiles.on_canvas(i, found.masks))

    return Scored(scores, images.labels, maps, masks, valid, regions and padded_regions)


def _empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A new array; if it is large, a memory map of a temporary file without a name."""
    if np.prod(shape) * np.dtype(dtype).itemsize <= _IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:
        return np.asarray(np.memmap(file, dtype, "w+", shape=shape))


def measure(scored: Scored, threshold: float | None = None) -> dict[str, float | None]:
    """Computes `METRICS`; None for a metric that needs masks or a class that the data lack.

    Args:
      scored: scores of all test images.
      threshold: of anomaly maps, for `seg_f1`; None: it is None.
    """
    return _measure(scored, threshold, _aupimo(scored))


def evaluate(
    scored: Scored, defects: Sequence[str], limits: Limits
) -> tuple[dict[str, float | None], Details]:
    """Computes `METRICS`, and the metrics of parts of the test images.

    Args:
      scored: scores of all N test images.
      defects: kind of defect of each image, [N], see `Source.defects`.
      limits: of the detector.
    """
    maps, masks, valid = scored.maps, scored.masks, scored.valid
    areas, sizes = _aupimo(scored), []
    rows = kinds.by_kind(scored.scores, scored.labels, defects, limits.image)
    for row in rows:
        of_kind = (scored.labels == 1) & np.array([row["kind"] in (None, d) for d in defects])
        row["aupimo"] = _mean(areas, of_kind)
        row["spro_05"] = _au_spro(scored, np.flatnonzero(of_kind | (scored.labels == 0)))
    if maps is not None and masks is not None and limits.pixel is not None:
        sizes = overlap.recall_by_size(
            maps, masks, limits.pixel, regions=scored.regions, valid=valid
        )
    per_image = None if areas is None else [None if np.isnan(a) else float(a) for a in areas]
    details = Details(rows, [dataclasses.asdict(size) for size in sizes], per_image)
    return _measure(scored, limits.pixel, areas), details


def _measure(
    scored: Scored, threshold: float | None, aupimo: np.ndarray | None
) -> dict[str, float | None]:
    """`measure`, given the AUPIMO of each image."""
    found: dict[str, float | None] = dict.fromkeys(METRICS)
    images = ranking.figures(scored.scores, scored.labels)
    if images is not None:
        found |= {"image_auroc": images.auroc, "image_ap": images.average_precision}
        found["image_f1"] = images.f1
    maps, masks, valid = scored.maps, scored.masks, scored.valid
    if maps is None or masks is None:
        return found
    weights = {"overlap": lambda i: overlap_weights(masks[i])}
    pixels = ranking.figures(
        maps, masks, valid=valid, weights=weights, fpr_limits=tuple(_AREAS.values())
    )
    if pixels is not None:
        found |= zip(_AREAS, pixels.areas["overlap"], strict=True)
        found |= {"pixel_auroc": pixels.auroc, "pixel_ap": pixels.average_precision}
        found["pixel_f1"] = pixels.f1
    if threshold is not None:
        found["seg_f1"] = overlap.segmentation_f1(maps, masks, threshold, valid=valid)
    found["aupimo"] = _mean(aupimo, scored.labels == 1)
    found["spro_05"] = _au_spro(scored)
    return found


def _aupimo(scored: Scored) -> np.ndarray | None:
    if scored.maps is None or scored.masks is None:
        return None
    return overlap.aupimo(scored.maps, scored.masks, scored.labels, valid=scored.valid)


def _mean(aupimo: np.ndarray | None, rows: np.ndarray) -> float | None:
    """Mean over the images that have defective pixels; None if there are none."""
    if aupimo is None or np.isnan(aupimo[rows]).all():
        return None
    return float(np.nanmean(aupimo[rows]))


def _au_spro(scored: Scored, rows: np.ndarray | None = None) -> float | None:
    maps, masks, regions = scored.maps, scored.masks, scored.regions
    if maps is None or masks is None or regions is None:
        return None
    limits = (_SPRO_LIMIT,)
    areas = overlap.au_spro(maps, masks, regions, limits, valid=scored.valid, rows=rows)
    return None if areas is None else areas[0]
