"""Heat maps: an image, its anomaly map in colours and, if known, its defect, side by side.

    picture = draw_heatmap(image, anomaly_map, low=0.0, high=4.0, mask=mask, title="crack/003.png")
    save_picture("heatmaps/crack_003.png", picture)

The colours are laid over the grey image, more opaque at higher values. `low` and `high` are the
ends of the colour range. Use the same range for all images that are to be compared.
"""

import errno
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastflow_jax.errors import InputError
from fastflow_jax.files import create_folder, replacing
from fastflow_jax.report.charts import ticks

# Errors that are due to the name of a file: too long, not encodable, or in conflict with a folder.
OF_THE_NAME = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ)

# Nine points of matplotlib's "inferno" (CC0). Its lightness rises evenly, so that the order of
# values is visible in grey print and to colour-blind readers.
_INFERNO = "000004 1f0c48 550f6d 88226a ba3655 e35933 f98c0a f9c932 fcffa4"
_COLOURS = np.frombuffer(bytes.fromhex(_INFERNO), np.uint8).reshape(-1, 3).astype(np.float32)
_OPACITY = 0.85  # of the highest value
_OUTLINE = (0, 255, 170)
_REGION = (90, 170, 255)  # outline of the region of interest
_PREDICTED, _NOTHING = (255, 196, 61), (28, 28, 33)  # in strips: predicted mask and its background
_INK, _FAINT, _PAPER = (32, 32, 36), (112, 112, 120), (255, 255, 255)
_SIDES = (256, 512)  # minimum and maximum of a panel's longer side in pixels
_STRIP_SIDE = 160  # longer side of a panel of a strip in pixels
_MARGIN, _GAP, _BAR = 12, 10, 14
_TITLE, _CAPTION = 15, 13  # font sizes


def draw_heatmap(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    *,
    low: float,
    high: float,
    mask: np.ndarray | None = None,
    threshold: float | None = None,
    title: str = "",
    region: np.ndarray | None = None,
) -> Image.Image:
    """Draws an image, its anomaly map and, with a mask, its defect, with a colour bar.

    Args:
      image: uint8 [H, W, 3]; its longer side is resized to 256 to 512 pixels.
      anomaly_map: [h, w], of any size; stretched to the image.
      low: value with the lowest colour; lower values have it too.
      high: value with the highest colour; higher values have it too.
      mask: bool [H', W'], True in the defect, all False for a good image; None for no panel.
      threshold: pixels with a higher anomaly map are outlined, and the colour bar marks it.
      title: line above the panels, such as the name and score of the image.
      region: bool [H', W'], the region of interest, which is outlined in the image; None for no
        outline.

    Raises:
      InputError: `high` is below `low`, one of them is not finite, or the map contains NaN.
    """
    low, high = float(low), float(high)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise InputError(f"Colours from {low} to {high}. Give two finite numbers, the lower first.")
    anomaly_map = np.asarray(anomaly_map, np.float32)
    if np.isnan(anomaly_map).any():
        raise InputError(
            f"The anomaly map of {title or 'an image'} contains NaN. The training has diverged: "
            "train again with a lower learning rate."
        )
    shown = _fit(Image.fromarray(image))
    coloured = _overlay(shown, anomaly_map, low, high)
    if threshold is not None:
        above = np.asarray(_stretch(anomaly_map, coloured.size)) > threshold
        coloured = _outline(coloured, above)
    bounded = shown if region is None else _outline(shown, _shrink(region, shown.size), _REGION)
    panels = [("image", bounded), ("anomaly map", coloured)]
    if mask is not None:
        outlined = _outline(shown, _shrink(mask, shown.size))
        panels.append(("defect" if mask.any() else "no defect", outlined))
    return _compose(panels, _colour_bar(shown.height, low, high, threshold), title)


def draw_strip(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    *,
    low: float,
    high: float,
    threshold: float,
    mask: np.ndarray | None = None,
    region: np.ndarray | None = None,
) -> Image.Image:
    """Draws small panels without gaps: image, anomaly map, predicted mask and ground truth.

    Args:
      image: uint8 [H, W, 3].
      anomaly_map: [h, w], of any size; stretched to the image.
      low: as in `draw_heatmap`.
      high: as in `draw_heatmap`.
      threshold: pixels with a higher anomaly map are in the predicted mask.
      mask: bool [H', W'], the ground truth, or None for three panels.
      region: as in `draw_heatmap`.
    """
    scale = _STRIP_SIDE / max(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    shown = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    bounded = shown if region is None else _outline(shown, _shrink(region, shown.size), _REGION)
    panels = [
        bounded,
        _overlay(shown, anomaly_map, low, high),
        _silhouette(np.asarray(_stretch(anomaly_map, shown.size)) > threshold, _PREDICTED),
    ]
    if mask is not None:
        panels.append(_silhouette(_shrink(np.asarray(mask), shown.size), _OUTLINE))
    return stack_pictures(panels, columns=len(panels))


def stack_pictures(pictures: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    """Joins pictures row by row, left-aligned, into one."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(sum(picture.width for picture in row) for row in rows)
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (width, sum(heights)), _PAPER)
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for picture in row:
            sheet.paste(picture, (x, y))
            x += picture.width
        y += height
    return sheet


def save_picture(path: str | os.PathLike, picture: Image.Image) -> None:
    """Writes a PNG or WebP file, as its suffix says, completely or not at all."""
    path = pathlib.Path(path)
    create_folder(path.parent)
    with replacing(path, "wb") as file:
        picture.save(file, format=path.suffix.removeprefix("."))


def _fit(image: Image.Image) -> Image.Image:
    """Resizes an image so that its longer side is within `_SIDES`."""
    side = max(image.size)
    scale = min(max(side, _SIDES[0]), _SIDES[1]) / side
    if scale == 1:
        return image
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _blend(values: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Lays the colours of values in [0, 1] over grey levels in [0, 255]; uint8 [..., 3]."""
    stops = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(values, stops, channel) for channel in _COLOURS.T], axis=-1)
    opacity = _OPACITY * np.sqrt(values)[..., None]
    return np.round(opacity * colours + (1 - opacity) * grey[..., None]).astype(np.uint8)


def _overlay(image: Image.Image, anomaly_map: np.ndarray, low: float, high: float) -> Image.Image:
    values = (np.clip(anomaly_map, low, high) - low) / (high - low if high > low else 1)
    grey = np.asarray(image.convert("L"), np.float32)
    return Image.fromarray(_blend(np.asarray(_stretch(values, image.size)), grey))


def _stretch(anomaly_map: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Resizes a map to (width, height), bilinearly."""
    return Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)


def _outline(
    image: Image.Image, inside: np.ndarray, colour: tuple[int, int, int] = _OUTLINE
) -> Image.Image:
    """Draws a line around a region, and a dark one around that for contrast."""
    border = np.ones_like(inside)
    border[2:-2, 2:-2] = False  # the line runs along the edge if the region touches it
    outside = _grow(_grow(inside))
    line = (outside & ~inside) | (inside & border)
    pixels = np.array(image)
    pixels[_grow(outside) & ~outside] = 0
    pixels[line] = colour
    return Image.fromarray(pixels)


def _shrink(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a mask to (width, height); a pixel is True if any part of it was."""
    shares = Image.fromarray(mask.astype(np.float32))
    return np.asarray(shares.resize(size, Image.Resampling.BOX)) > 0


def _silhouette(mask: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    """Draws a mask in a colour on a dark background."""
    return Image.fromarray(np.where(mask[..., None], colour, _NOTHING).astype(np.uint8))


def _grow(mask: np.ndarray) -> np.ndarray:
    """Adds the four neighbours of each True pixel to a mask [H, W]."""
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _colour_bar(height: int, low: float, high: float, threshold: float | None) -> Image.Image:
    """Draws the colours over mid-grey, lowest at the bottom, with numbers to the right.

    A line marks the threshold, at the nearer end if it is out of range, with a darker number.
    """
    font, texts = ImageFont.load_default(_CAPTION), ticks(low, high)
    limit = [] if threshold is None else [f"{threshold:.3g}"]
    width = _BAR + 7 + math.ceil(max(font.getlength(text) for text in (*texts.values(), *limit)))
    bar = Image.new("RGB", (width, height), _PAPER)
    values = np.broadcast_to(np.linspace(1, 0, height)[:, None], (height, _BAR))
    bar.paste(Image.fromarray(_blend(values, np.full(values.shape, 128.0))), (0, 0))
    draw = ImageDraw.Draw(bar)

    def place(value: float) -> tuple[float, float]:
        """Heights of a value and of the middle of its number."""
        part = (value - low) / (high - low) if high > low else 0
        y = (height - 1) * (1 - min(max(part, 0), 1))
        return y, min(max(y, _CAPTION / 2), height - _CAPTION / 2)

    last = taken = math.inf  # heights of numbers that the next one must not overlap
    if threshold is not None:
        y, taken = place(threshold)
        y = min(max(y, 2), height - 3)
        draw.rectangle([(0, y - 2), (_BAR - 1, y + 2)], fill=(0, 0, 0))
        draw.rectangle([(0, y - 1), (_BAR + 3, y + 1)], fill=_OUTLINE)
        draw.text((_BAR + 7, taken), limit[0], fill=_INK, font=font, anchor="lm")
    for value, text in texts.items():
        y, middle = place(value)
        if last - middle >= _CAPTION and abs(middle - taken) >= _CAPTION:
            draw.line([(_BAR, y), (_BAR + 3, y)], fill=_FAINT)
            draw.text((_BAR + 7, middle), text, fill=_FAINT, font=font, anchor="lm")
            last = middle
    return bar


def _compose(panels: list[tuple[str, Image.Image]], bar: Image.Image, title: str) -> Image.Image:
    """Joins panels from left to right, with captions below, and the bar, under a title."""
    title_font, font = ImageFont.load_default(_TITLE), ImageFont.load_default(_CAPTION)
    cells = [max(panel.width, math.ceil(font.getlength(name))) for name, panel in panels]
    top = _MARGIN + (_TITLE + 9 if title else 0)
    width = 2 * _MARGIN + max(
        sum(cells) + _GAP * len(panels) + bar.width, math.ceil(title_font.getlength(title))
    )
    picture = Image.new("RGB", (width, top + bar.height + 8 + _CAPTION + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=title_font)
    x = _MARGIN
    for (name, panel), cell in zip(panels, cells, strict=True):
        picture.paste(panel, (x, top))
        draw.text((x, top + panel.height + 6), name, fill=_FAINT, font=font)
        x += cell + _GAP
    picture.paste(bar, (x, top))
    return picture
