"""Scores images by a server of the open inference protocol (v2): KServe, Triton or --mode=serve.

python request.py http://127.0.0.1:8000 screws 256 256 photos/*.jpg

The numbers are the height and width of the model's input, to which images are resized. Needs numpy
and Pillow.
"""

import json
import sys
import urllib.request

import numpy as np
from PIL import Image, ImageOps


def pixels(file: str, height: int, width: int) -> np.ndarray:
    """The image at the input size, uint8 [height, width, 3]."""
    with Image.open(file) as image:
        turned = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(turned.resize((width, height), Image.Resampling.BILINEAR))


def main(server: str, model: str, height: str, width: str, *files: str) -> None:
    """Prints the score, the p-value and the decision of each file."""
    images = np.stack([pixels(file, int(height), int(width)) for file in files])
    given = {"name": "images", "datatype": "UINT8", "shape": images.shape}
    names = ("score", "p_value", "is_anomalous")
    request = urllib.request.Request(
        f"{server}/v2/models/{model}/infer",
        json.dumps(
            {
                "inputs": [given | {"data": images.ravel().tolist()}],
                "outputs": [{"name": name} for name in names],
            }
        ).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        outputs = {each["name"]: each["data"] for each in json.load(response)["outputs"]}
    for file, *values in zip(files, *(outputs[name] for name in names), strict=True):
        print(file, *values, sep="\t")


if __name__ == "__main__":
    main(*sys.argv[1:])
