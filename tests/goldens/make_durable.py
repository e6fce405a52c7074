"""A saved detector of each kind in format 1 and its scores, which later versions must repeat.

python tests/goldens/make_durable.py

FastFlow's is a directory with the weights of a backbone, the others are .zip files on pixels.
"""

import json
import pathlib
import shutil
import tempfile

import numpy as np

from fastflow_jax import Detector
from fastflow_jax.backbones import find_spec, porting
from fastflow_jax.config import default
from fastflow_jax.detectors.base import recipe

HERE = pathlib.Path(__file__).parent
TRAINED = {"train.epochs": 1, "train.batch_size": 8}
KINDS = {
    "fastflow": {"flow.steps": 2, "flow.hidden_ratio": 0.5, "map.bank": 20, **TRAINED},
    "knn": {"knn.points": 20},
    "gaussian": {"gaussian.per_location": True},
    "subspace": {"subspace.variance": 0.5},
    "patchcore": {"patchcore.dimension": 8, "patchcore.max_points": 20},
    "spade": {"feature_dtype": "bfloat16"},
    "cflow": {"cflow.steps": 1, "cflow.encoding": 8, **TRAINED},
    "vae": {"vae.width": 2, "vae.latent": 4, **TRAINED},
    "gan": {"gan.width": 2, "gan.latent": 4, **TRAINED},
}


def images(n: int, seed: int) -> np.ndarray:
    """Grey noise, uint8 [n, 20, 30, 3]; every other image has a red square."""
    made = np.random.default_rng(seed).integers(118, 138, (n, 20, 30, 3), np.uint8)
    made[1::2, 6:16, 12:24] = (250, 20, 20)
    return made


def fitted(kind: str, weights: pathlib.Path) -> Detector:
    """A detector that trains in seconds; FastFlow uses the weight file."""
    config = default()
    config.update(recipe(kind))
    config.backbone, config.image_size = "pixels", (16,)
    if kind == "fastflow":
        config.backbone, config.layers = "tf_efficientnet_lite0", ("blocks.0",)
        config.weights = str(weights)
    config.batch_size, config.data.holdout = 8, 0.25
    config.update_from_flattened_dict(KINDS[kind])
    return Detector.fit(images(24, seed=0)[::2], config=config)


def write_weights(file: pathlib.Path) -> None:
    """Writes random weights of the layers that are used."""
    spec, rng = find_spec("tf_efficientnet_lite0"), np.random.default_rng(0)
    slots = porting.slots(spec.module(("blocks.0",)), spec.image_size)
    made = {name: rng.uniform(0.1, 0.5, slot.timm_shape) for name, slot in slots.items()}
    np.savez(file, **{name: x.astype(np.float32) for name, x in made.items()})


def main() -> None:
    """Train, save and score."""
    folder, scores = HERE / "durable", {}
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        weights = pathlib.Path(temporary, "weights.npz")
        write_weights(weights)
        for kind in KINDS:
            name = kind if kind == "fastflow" else f"{kind}.zip"
            detector = fitted(kind, weights)
            detector.save(folder / name)
            scores[name] = [
                {
                    "score": result.score,
                    "p_value": result.p_value,
                    "is_anomalous": result.is_anomalous,
                    "map_mean": float(result.anomaly_map.mean()),
                    "distance": result.distance,
                }
                for result in detector.predict(list(images(2, seed=1)))
            ]
    (HERE / "durable_scores.json").write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
