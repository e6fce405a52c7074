"""A small trained run and the scores that it gives, which later versions must load and repeat.

python tests/goldens/make_run.py
"""

import json
import pathlib
import shutil

import numpy as np

from fastflow_jax import Detector
from fastflow_jax.config import default

HERE = pathlib.Path(__file__).parent


def images(n: int, seed: int) -> np.ndarray:
    """Grey noise, uint8 [n, 20, 30, 3]; every other image has a red square."""
    made = np.random.default_rng(seed).integers(118, 138, (n, 20, 30, 3), np.uint8)
    made[1::2, 6:16, 12:24] = (250, 20, 20)
    return made


def main() -> None:
    """Train, score, and write `run/` and `run_scores.json`."""
    config = default()
    config.backbone, config.image_size = "pixels", (16,)
    config.flow.steps, config.flow.hidden_ratio = 2, 2.0
    config.train.epochs, config.train.batch_size, config.data.holdout = 2, 8, 0.25
    config.batch_size = 8
    run = HERE / "run"
    shutil.rmtree(run, ignore_errors=True)
    detector = Detector.fit(images(32, seed=0)[::2], config=config).save(run)
    results = Detector.load(detector).predict(list(images(6, seed=1)))
    scores = [
        {
            "score": result.score,
            "p_value": result.p_value,
            "is_anomalous": result.is_anomalous,
            "map_mean": float(result.anomaly_map.mean()),
        }
        for result in results
    ]
    (HERE / "run_scores.json").write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
