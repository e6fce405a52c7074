"""Heat maps, strips and scores of the test images of one training, written to its directory."""

import itertools
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastflow_jax import parallel
from fastflow_jax.data.dataset import Source
from fastflow_jax.data.transforms import Placement, seen_part
from fastflow_jax.decision import Threshold
from fastflow_jax.evaluation.evaluate import Scored
from fastflow_jax.evaluation.metrics import PixelCurves, pixel_curves
from fastflow_jax.files import synchronise, write_json
from fastflow_jax.report.heatmaps import OF_THE_NAME, draw_heatmap, draw_strip, save_picture

_log = logging.getLogger(__name__)
_SCALE_IMAGES = 500  # maximum number of good images that set the colour range
_SCALE_PIXELS = 1 << 25  # of these images
_PANELS = ["image", "heat map", "mask", "ground truth"]  # of a strip


def write_pictures(
    folder: pathlib.Path,
    source: Source,
    scored: Scored,
    maps_of: Callable[[Sequence[int]], Iterable[np.ndarray]],
    *,
    heatmaps: int,
    strips: int,
    placed: Callable[[tuple[int, int]], Placement],
    threshold: Mapping | None,
    aupimo: Sequence[float | None] | None = None,
) -> None:
    """Writes `scores.json`, `heatmaps/` and `strips/`, with one colour range for all images.

    Heat maps show the highest scores, defective and good in turn. Strips are for the report and
    show all images or, if there are too many, images at evenly spaced ranks. The colours range from
    the median pixel of good images (m) to m + 2 (q - m), where q is their 0.999 quantile.

    Args:
      folder: directory of the training.
      source: the test images, in the order of `scored`.
      scored: their scores.
      maps_of: returns the anomaly maps of images, given their indices.
      heatmaps: maximum number of heat maps.
      strips: maximum number of strips.
      placed: returns the placement of an image of (height, width) in its map.
      threshold: `thresholds.Threshold` of maps as a dict. If None, the F1-optimal one for the test
        masks or, without masks, the 0.999 quantile of the maps of good images (or of all images).
      aupimo: of each image, see `overlap.aupimo`, or None without masks.
    """
    in_heatmaps, in_strips = _chosen(scored, heatmaps, strips)
    curves = None
    if scored.maps is not None:
        curves = pixel_curves(scored.maps, scored.masks, valid=scored.valid)
    content = _content(source, scored, curves)
    for image, area in zip(content["images"], aupimo or (), strict=aupimo is not None):
        image["aupimo"] = area
    if in_heatmaps or in_strips:
        good = np.flatnonzero(scored.labels == 0)
        normal = good if len(good) else np.arange(len(source))
        low, high = _colour_range(normal, maps_of, scored.valid)
        limit, origin = _mask_threshold(threshold, curves, float(high), len(good) > 0)
        content |= {"mask_threshold": limit, "mask_threshold_is": origin}
        chosen = list(dict.fromkeys(in_heatmaps + in_strips))
        pairs = zip(chosen, maps_of(chosen), strict=True)
        bar = {"desc": "pictures", "unit": "img", "leave": False, "dynamic_ncols": True}
        for i, anomaly_map in tqdm(pairs, total=len(chosen), **bar):
            if not parallel.is_main():  # other processes only help to compute the maps
                continue
            example = source[i]
            where = placed(example.image.shape[:2])
            image, anomaly_map = seen_part(example.image, where), anomaly_map[where.place]
            mask = None if example.mask is None else seen_part(example.mask, where)
            scale = {"low": low, "high": high + (high - low), "mask": mask}
            if scored.valid is not None and not (region := scored.valid[i][where.place]).all():
                scale["region"] = region
            if i in in_heatmaps:
                title = f"{example.name}  score {scored.scores[i]:.3f}"
                picture = draw_heatmap(image, anomaly_map, **scale, title=title)
                _save_heatmap(folder, example.name, picture)
            if i in in_strips:
                strip = draw_strip(image, anomaly_map, **scale, threshold=limit)
                save_picture(folder / "strips" / f"{i}.webp", strip)
                width = strip.width // (3 if mask is None else 4)
                content["images"][i]["size"] = [width, strip.height]
        content["panels"] = _PANELS[: 3 if scored.masks is None else 4]
    for name in ("heatmaps", "strips"):
        if (folder / name).is_dir():
            synchronise(folder / name)
    write_json(folder / "scores.json", content)


def _chosen(scored: Scored, heatmaps: int, strips: int) -> tuple[list[int], list[int]]:
    """Returns the indices of images with a heat map and with a strip, see `write_pictures`."""
    ranked = np.argsort(-scored.scores, kind="stable")
    good, bad = (ranked[scored.labels[ranked] == label].tolist() for label in (0, 1))
    in_turn = (i for pair in itertools.zip_longest(bad, good) for i in pair if i is not None)
    ranks = np.linspace(0, len(ranked) - 1, min(strips, len(ranked))).astype(int)
    return list(itertools.islice(in_turn, heatmaps)), ranked[np.unique(ranks)].tolist()


def _colour_range(
    normal: np.ndarray, maps_of: Callable, valid: np.ndarray | None
) -> tuple[np.floating, np.floating]:
    """Returns the median and the 0.999 quantile of the pixels of up to `_SCALE_IMAGES` images.

    Of large maps every few pixels are taken, because all of them may not fit into memory. For
    `valid` see `Scored`.
    """
    some, most = normal[:: -(-len(normal) // _SCALE_IMAGES)].tolist(), _SCALE_PIXELS
    parts = []
    for i, anomaly_map in zip(some, maps_of(some), strict=True):
        pixels = anomaly_map.reshape(-1) if valid is None else anomaly_map[valid[i]]
        parts.append(pixels[:: -(-anomaly_map.size * len(some) // most)])
    pixels = np.concatenate(parts)
    return np.quantile(pixels, 0.5), np.quantile(pixels, 0.999)


def _content(source: Source, scored: Scored, curves: PixelCurves | None) -> dict[str, Any]:
    """Returns the content of `scores.json` without pictures."""
    rows = zip(source.names, source.defects, scored.labels, scored.scores, strict=True)
    content: dict[str, Any] = {
        "images": [
            {"name": name, "defect": defect, "label": int(label), "score": float(score)}
            for name, defect, label, score in rows
        ]
    }
    if curves is not None:
        content["pixel_curves"] = {
            name: getattr(curves, name).round(6).tolist()
            for name in ("false_positive_rate", "true_positive_rate", "overlap")
        }
    return content


def _mask_threshold(
    given: Mapping | None, curves: PixelCurves | None, high: float, has_good: bool
) -> tuple[float, str]:
    """Returns the threshold of predicted masks and its description, see `write_pictures`."""
    if given is not None:
        return given["value"], f"{Threshold(**given).promise}, of pixels"
    if curves is not None:
        best = np.float32(curves.thresholds[np.argmax(curves.f1)])  # maps that reach it count
        below = float(np.nextafter(best, np.float32(-np.inf)))
        return below, "F1-optimal on the test masks"
    images = "good test images" if has_good else "test images"
    return high, f"exceeded by 0.1 % of the pixels of {images}"


def _save_heatmap(folder: pathlib.Path, name: str, picture: Image.Image) -> None:
    """Saves a heat map; logs a warning if its name is not possible."""
    try:
        save_picture((folder / "heatmaps" / name).with_suffix(".png"), picture)
    except OSError as error:
        if error.errno not in OF_THE_NAME:
            raise
        _log.warning("The heat map of %s cannot be written: %s", name, error)
