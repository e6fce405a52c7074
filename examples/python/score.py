"""Scores images with an exported detector, without JAX.

python score.py screws.onnx photos/*.jpg

Needs numpy, Pillow and onnxruntime: pip install numpy pillow onnxruntime, then
pip install --no-deps fastflow-jax.
"""

import sys

from fastflow_jax.exported import Exported


def main(model: str, *files: str) -> None:
    """Prints the score, the p-value and the decision of each file."""
    detector = Exported(model)
    for result in detector.stream(files):
        decision = {True: "anomalous", False: "normal", None: "no threshold"}[result.is_anomalous]
        print(f"{result.name}\t{result.score:.6g}\t{result.p_value}\t{decision}")


if __name__ == "__main__":
    main(*sys.argv[1:])
