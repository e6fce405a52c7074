"""What is kept of the scored test images of one training, to look at."""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from fastflow_jax import parallel
from fastflow_jax.data.dataset import Source
from fastflow_jax.data.transforms import Placement, seen_part
from fastflow_jax.evaluation.evaluate import Scored
from fastflow_jax.evaluation.metrics import pixel_curves
from fastflow_jax.files import write_json
from fastflow_jax.report.heatmaps import OF_THE_NAME, draw_heatmap, draw_strip, save_picture

_SCALE_IMAGES = 500  # good images, evenly chosen, that set the colours of heat maps


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
) -> None:
    """Write `scores.json`, `heatmaps/` and `strips/`, on one colour scale; one map at a time.

    Heat maps are of the highest scores, defective and good in turn; strips, which a report shows,
    of all images or, where these are too many, of some with evenly spaced ranks.

    Args:
      folder: where to.
      source: the images, in the order of `scored`.
      scored: what a detector made of them.
      maps_of: indices -> the anomaly map of each.
      heatmaps: pictures at the most.
      strips: likewise.
      placed: (height, width) of an image -> how it came to lie in its map.
      threshold: of maps, a plain `thresholds.Threshold`; pixels above it are called defective.
        None: the F1-optimal one on the test masks or, without masks, the 0.999 quantile of good
        test images, or of all if none is good.
    """
    n = len(source)
    ranked = np.argsort(-scored.scores, kind="stable")
    good, bad = (ranked[scored.labels[ranked] == label] for label in (0, 1))
    turns = itertools.zip_longest(bad, good)
    in_heatmaps = [int(i) for turn in turns for i in turn if i is not None][:heatmaps]
    in_strips = ranked[np.unique(np.linspace(0, n - 1, min(strips, n)).astype(int))].tolist()
    content = {
        "images": [
            {"name": name, "defect": defect, "label": int(label), "score": float(score)}
            for name, defect, label, score in zip(
                source.names, source.defects, scored.labels, scored.scores, strict=True
            )
        ]
    }
    curves = pixel_curves(scored.maps, scored.masks, valid=scored.valid)
    if curves is not None:
        content["pixel_curves"] = {
            name: getattr(curves, name).round(6).tolist()
            for name in ("false_positive_rate", "true_positive_rate", "overlap")
        }
    if not in_heatmaps and not in_strips:
        write_json(folder / "scores.json", content)
        return
    # From the typical pixel to the highest that a good image reaches, but for outliers.
    normal = np.sort(good if len(good) else ranked)
    normal = np.stack(list(maps_of(normal[:: -(-len(normal) // _SCALE_IMAGES)])))
    low, high = np.quantile(normal, 0.5), np.quantile(normal, 0.999)
    if threshold is not None:
        mask_threshold = threshold["value"]
        part = f"{threshold['rate']:.2g} of normal pixels"
        mask_threshold_is = f"{part} lie above it, by {threshold['n']} images that were held out"
    elif curves is not None:
        best = np.float32(curves.thresholds[np.argmax(curves.f1)])  # reached, not exceeded
        mask_threshold = float(np.nextafter(best, np.float32(-np.inf)))
        mask_threshold_is = "F1-optimal on the test masks"
    else:
        mask_threshold = float(high)
        images = "good test images" if len(good) else "test images"
        mask_threshold_is = f"exceeded by 0.1 % of the pixels of {images}"
    content |= {"mask_threshold": mask_threshold, "mask_threshold_is": mask_threshold_is}
    chosen = list(dict.fromkeys(in_heatmaps + in_strips))
    in_heatmaps, in_strips = set(in_heatmaps), set(in_strips)
    bar = {"desc": "pictures", "unit": "img", "leave": False, "dynamic_ncols": True}
    for i, anomaly_map in tqdm(zip(chosen, maps_of(chosen), strict=True), total=len(chosen), **bar):
        if not parallel.is_main():  # which takes part in computing the maps, no more
            continue
        example = source[i]
        where = placed(example.image.shape[:2])
        image, anomaly_map = seen_part(example.image, where), anomaly_map[where.place]
        mask = None if example.mask is None else seen_part(example.mask, where)
        scale = {"low": low, "high": high + (high - low), "mask": mask}
        if i in in_heatmaps:
            title = f"{example.name}  score {scored.scores[i]:.3f}"
            picture = draw_heatmap(image, anomaly_map, **scale, title=title)
            try:
                save_picture((folder / "heatmaps" / example.name).with_suffix(".png"), picture)
            except OSError as error:
                if error.errno not in OF_THE_NAME:
                    raise
                tqdm.write(f"the heat map of {example.name} cannot be written: {error}")
        if i in in_strips:
            strip = draw_strip(image, anomaly_map, **scale, threshold=mask_threshold)
            save_picture(folder / "strips" / f"{i}.webp", strip)
            panels = 3 if mask is None else 4
            content["images"][i]["size"] = [strip.width // panels, strip.height]
    content["panels"] = ["image", "heat map", "mask"] + ["truth"] * (scored.masks is not None)
    write_json(folder / "scores.json", content)
