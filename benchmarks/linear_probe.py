"""What do a backbone's feature maps hold, for a linear reader who is shown the defects?

    python benchmarks/linear_probe.py --data elpv/mono
    python benchmarks/linear_probe.py --data FOLDER --backbone wide_resnet50_2

A frontier for detectors that learn from normal images alone on the same maps, not a detector: the
probe sees the labels of four fifths of the test images, and is asked about the last, five times.
Logistic regressions on standardised numbers (C = 0.01): for an image, of each channel the mean, the
maximum and the minimum over each map; for a pixel, all maps at the side of the finest one, at most
20,000 sound places a fold, and the same interpolation, and no blur, from there to the masks.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from our_fastflow import configuration
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from fastflow_jax import data
from fastflow_jax.backbones import create_backbone
from fastflow_jax.detectors.maps import resize_map
from fastflow_jax.evaluation import metrics
from fastflow_jax.features.prepare import feature_batches

FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)
SOUND_PLACES = 20_000  # of a fold, to learn from


def reader():
    """Standardise, then regress."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))


def image_probe(maps: list[np.ndarray], labels: np.ndarray) -> float:
    """AUROC of images by maps [N, h, w, C]."""
    summaries = [f(m, axis=(1, 2)) for m in maps for f in (np.mean, np.max, np.min)]
    x = np.concatenate(summaries, axis=-1)
    scores = cross_val_predict(reader(), x, labels, cv=FOLDS, method="decision_function")
    return metrics.image_auroc(scores, labels)


def pixel_probe(maps: list[np.ndarray], labels: np.ndarray, masks: np.ndarray) -> float:
    """AUROC of pixels by maps [N, h, w, C] and masks [N, H, W]; a fold holds whole images."""
    side = max(m.shape[1:3] for m in maps)
    resized = [jax.image.resize(m, (*m.shape[:1], *side, m.shape[-1]), "bilinear") for m in maps]
    x = np.concatenate(resized, axis=-1)
    y = np.asarray(resize_map(masks.astype(np.float32), side)) > 0.5
    scores = np.zeros(x.shape[:3], np.float32)
    rng = np.random.default_rng(0)
    for train, test in tqdm(list(FOLDS.split(x, labels)), desc="pixels", unit="fold"):
        places, defective = x[train].reshape(-1, x.shape[-1]), y[train].ravel()
        sound = np.flatnonzero(~defective)
        sound = rng.choice(sound, min(len(sound), SOUND_PLACES), replace=False)
        rows = np.concatenate([np.flatnonzero(defective), sound])
        fitted = reader().fit(places[rows], defective[rows])
        scores[test] = fitted.decision_function(x[test].reshape(-1, x.shape[-1])).reshape(-1, *side)
    finest = jax.jit(lambda s: resize_map(s, masks.shape[1:]))
    return metrics.pixel_auroc(
        np.concatenate([finest(jnp.asarray(s[None])) for s in scores]), masks
    )


def main() -> None:
    """Read the test images' maps, and print both AUROCs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="elpv/mono, elpv/poly or a folder")
    parser.add_argument("--backbone", help="the default's where none is named")
    args = parser.parse_args()
    config = configuration(args.data, args.backbone)
    backbone = create_backbone(config.backbone, layers=config.layers)
    source = data.open_dataset(config.data).test
    parts, labels, masks = [], [], []
    with tqdm(total=len(source), desc="test images", unit="img") as bar:
        for batch in feature_batches(config, backbone, source):
            parts.append([np.asarray(m, np.float32) for m in batch.image])
            labels.append(batch.label)
            masks.append(batch.mask)
            bar.update(len(batch.label))
    maps, labels = [np.concatenate(m) for m in zip(*parts, strict=True)], np.concatenate(labels)
    print(
        f"{config.backbone}, {', '.join(config.layers)}, {len(labels)} test images of {args.data}"
    )
    print(f"image AUROC {image_probe(maps, labels):.4f}")
    if masks[0] is not None:
        print(f"pixel AUROC {pixel_probe(maps, labels, np.concatenate(masks)):.4f}")


if __name__ == "__main__":
    main()
