"""Writes a data set with synthetic defects, painted on your own normal images.

    python benchmarks/painted.py photos/good painted --train 60
    python benchmarks/painted.py cork.png painted --crop 160 --train 60
    python -m fastflow_jax.main --config=configs/folder.py --config.data.root=painted

From a directory, some images are for training and the rest, unchanged or with a defect, for
testing. From one large image of a material, training images are crops of its left half and test
images of its right half. The layout is that of `docs/data.md`, with exact masks. The same arguments
write the same images.

There are six kinds of defects in turn, of random size and strength: a crack, a stain, a patch from
elsewhere in the image, a smear, a twist, a few flecks. docs/recipe.md describes what can be learned
from results on them.
"""

import argparse
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import map_coordinates

from fastflow_jax.data.layout import list_images
from fastflow_jax.data.synthetic import crop
from fastflow_jax.data.transforms import decode_image, read_file
from fastflow_jax.errors import InputError

GOOD = 36  # normal test crops of one image
DEFECTIVE = 48  # defective test crops of one image
Painted = tuple[np.ndarray, np.ndarray]  # image [H, W, 3], 0 to 255, and mask bool [H, W]


def _ellipse(rng, image, radii: tuple[float, float]) -> np.ndarray:
    """Distance from a random centre, [H, W], 1 on the ellipse; radii are shares of the side."""
    size = np.array(image.shape[:2])
    centre = rng.uniform(0.15, 0.85, 2) * size
    radius = rng.uniform(*radii, 2) * size.min()
    places = np.moveaxis(np.indices(image.shape[:2]), 0, -1)
    return np.linalg.norm((places - centre) / radius, axis=-1)


def _colour(rng):
    """Black, white, or a random colour."""
    return rng.uniform(0, 255, 3) if rng.random() < 0.5 else rng.choice([0.0, 255.0])


def _blend(image, colour, weight: np.ndarray) -> np.ndarray:
    return image + weight[..., None] * (colour - image)


def crack(rng: np.random.Generator, image: np.ndarray) -> Painted:
    """Thin line with random turns, dark more often than bright."""
    size = np.array(image.shape[1::-1])
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.5, 8))
    step = rng.uniform(0.03, 0.1) * size.min()
    path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1) * step, axis=0)
    path += size * rng.uniform(0.2, 0.8, 2) - path.mean(0)
    canvas = Image.new("1", tuple(int(n) for n in size))
    width = max(1, round(rng.uniform(0.006, 0.02) * size.min()))
    ImageDraw.Draw(canvas).line([tuple(point) for point in path], fill=1, width=width)
    mask = np.asarray(canvas)
    colour = rng.choice([0.0, 255.0], p=[0.7, 0.3])
    return _blend(image, colour, rng.uniform(0.3, 0.8) * mask), mask


def stain(rng: np.random.Generator, image: np.ndarray) -> Painted:
    """Ellipse, densest at its centre."""
    distance = _ellipse(rng, image, (0.03, 0.15))
    density = rng.uniform(0.15, 0.5) * np.sqrt(np.clip(1 - distance, 0, 1))
    return _blend(image, _colour(rng), density), distance < 1


def patch(rng: np.random.Generator, image: np.ndarray) -> Painted:
    """Rotated square from elsewhere in the image."""
    size = np.array(image.shape[:2])
    edge = max(2, int(rng.uniform(0.08, 0.25) * size.min()))
    (top, left), (y, x) = rng.integers(0, size - edge, (2, 2))
    turned = np.rot90(image[y : y + edge, x : x + edge], rng.integers(1, 4))
    square = np.s_[top : top + edge, left : left + edge]
    painted, mask = image.copy(), np.zeros(image.shape[:2], bool)
    painted[square], mask[square] = turned, True
    return painted, mask


def smear(rng: np.random.Generator, image: np.ndarray) -> Painted:
    """Blurred ellipse."""
    mask = _ellipse(rng, image, (0.06, 0.18)) < 1
    radius = rng.uniform(0.008, 0.02) * min(image.shape[:2])
    blurred = Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.where(mask[..., None], np.asarray(blurred, float), image), mask


def twist(rng: np.random.Generator, image: np.ndarray) -> Painted:
    """Disc twisted about its centre, not at its edge."""
    size = np.array(image.shape[:2])
    centre, radius = rng.uniform(0.2, 0.8, 2) * size, rng.uniform(0.08, 0.2) * size.min()
    y, x = np.indices(image.shape[:2]) - centre[:, None, None]
    distance = np.hypot(y, x) / radius
    angle = rng.choice([-1, 1]) * rng.uniform(0.6, 1.5) * np.clip(1 - distance, 0, 1)
    turned = np.stack(
        [y * np.cos(angle) - x * np.sin(angle), y * np.sin(angle) + x * np.cos(angle)]
    )
    source = turned + centre[:, None, None]
    moved = [map_coordinates(image[..., c], source, order=1, mode="reflect") for c in range(3)]
    mask = distance < 1
    return np.where(mask[..., None], np.stack(moved, axis=-1), image), mask


def flecks(rng: np.random.Generator, image: np.ndarray) -> Painted:
    """One to four small spots of one colour."""
    mask = np.zeros(image.shape[:2], bool)
    for _ in range(rng.integers(1, 5)):
        mask |= _ellipse(rng, image, (0.01, 0.025)) < 1
    return _blend(image, _colour(rng), rng.uniform(0.3, 0.8) * mask), mask


KINDS: dict[str, Callable[[np.random.Generator, np.ndarray], Painted]] = {
    painter.__name__: painter for painter in (crack, stain, patch, smear, twist, flecks)
}


def write(folder: pathlib.Path, train, good, to_paint, rng: np.random.Generator) -> None:
    """Writes the data set from three sequences of images [H, W, 3]."""

    def save(pixels, *place):
        file = folder.joinpath(*place)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels).astype(np.uint8)).save(file)

    for i, image in enumerate(train):
        save(image, "train", "good", f"{i:04}.png")
    for i, image in enumerate(good):
        save(image, "test", "good", f"{i:04}.png")
    kinds = list(KINDS)
    for i, image in enumerate(to_paint):
        kind = kinds[i % len(kinds)]
        painted, mask = KINDS[kind](rng, image.astype(float))
        save(painted.clip(0, 255), "test", kind, f"{i:04}.png")
        save(255.0 * mask, "ground_truth", kind, f"{i:04}_mask.png")


def read(path: pathlib.Path) -> np.ndarray:
    """Reads an image, uint8 [H, W, 3]."""
    return decode_image(read_file(path), str(path))


def paint(args: argparse.Namespace) -> None:
    """Reads the source and writes the data set."""
    rng = np.random.default_rng(args.seed)
    if args.crop:
        image = read(args.source)
        if image.shape[0] > image.shape[1]:
            image = image.transpose(1, 0, 2)
        middle = image.shape[1] // 2
        if args.crop > min(middle, image.shape[0]):
            raise InputError(
                f"{args.source} is too small for crops of {args.crop} pixels. Lower --crop."
            )
        left, right = image[:, :middle], image[:, middle:]

        def crops(half, n):
            return (crop(rng, half, args.crop) for _ in range(n))

        parts = crops(left, args.train), crops(right, GOOD), crops(right, DEFECTIVE)
        write(args.folder, *parts, rng)
        return
    paths = list_images(args.source)
    if len(paths) < args.train + 2:
        raise InputError(
            f"{args.source} has {len(paths)} images, none left for testing. Lower --train."
        )
    paths = [paths[i] for i in rng.permutation(len(paths))]
    rest = paths[args.train :][: args.test]
    good = round(0.4 * len(rest))
    parts = paths[: args.train], rest[:good], rest[good:]
    write(args.folder, *(map(read, part) for part in parts), rng)


def main() -> None:
    """Writes the data set and prints the options that use it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=pathlib.Path, help="directory of normal images, or one image"
    )
    parser.add_argument("folder", type=pathlib.Path, help="directory to create")
    parser.add_argument("--train", type=int, default=60, help="number of training images")
    parser.add_argument("--test", type=int, help="largest number of test images of a directory")
    parser.add_argument("--crop", type=int, help="side of the crops of one image, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists. Name another directory, or remove it.")
    if args.source.is_file() != (args.crop is not None):
        parser.error("--crop must be given for one image, and only then.")
    try:
        paint(args)
    except InputError as error:
        parser.error(str(error))
    print(f"Written. Run it with --config=configs/folder.py --config.data.root={args.folder}")


if __name__ == "__main__":
    main()
