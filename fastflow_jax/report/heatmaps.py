"""Heat maps: a photograph, where it is anomalous, and where its defect is, side by side.

    picture = draw_heatmap(image, anomaly_map, low=0.0, high=4.0, mask=mask, title="crack/003.png")
    save_picture("heatmaps/crack_003.png", picture)

The heat is laid over the photograph without its colours, so that hue means heat alone, and it
grows more opaque as it grows hotter, so that the normal part stays visible. `low` and `high` are
the ends of the colours: take the same for all images of a set, or pictures cannot be compared.
"""

import errno
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastflow_jax.errors import InputError
from fastflow_jax.report.charts import ticks

# What the name of a picture may be to blame for: too long, or that of a folder.
OF_THE_NAME = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ)

# Lightness rises evenly from black over violet and red to pale yellow (the "inferno" map of
# matplotlib, CC0, at nine points), so that hotter is lighter in print and to the colour-blind too.
_COLOURS = np.array(
    [
        (0, 0, 4),
        (31, 12, 72),
        (85, 15, 109),
        (136, 34, 106),
        (186, 54, 85),
        (227, 89, 51),
        (249, 140, 10),
        (249, 201, 50),
        (252, 255, 164),
    ],
    np.float32,
)
_OPACITY = 0.85  # at the hottest
_OUTLINE = (0, 255, 170)
_CALLED, _NOTHING = (255, 196, 61), (28, 28, 33)  # in strips: what is called defective, and not
_INK, _FAINT, _PAPER = (32, 32, 36), (112, 112, 120), (255, 255, 255)
_SIDES = (256, 512)  # pixels of a panel's longer side, at least and at most
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
) -> Image.Image:
    """Photograph, heat and, where there is a mask, the outline of the defect, with a colour bar.

    Args:
      image: uint8 [H, W, 3], shown in its own proportions, 256 to 512 pixels long.
      anomaly_map: [h, w], of any size; stretched over the image.
      low: the value, in the map's units, of no heat; lower ones look the same.
      high: the value of full heat; higher ones look the same.
      mask: bool [H', W'], True where the image is defective; all False for a good image.
      threshold: what lies above it, in the map's units, is outlined in the heat, and the colour
            bar shows where it stands.
      title: a line above the panels, such as the image's name and score.

    Raises:
        InputError: where `high` is below `low` or either is not finite, or the map holds NaN.
    """
    low, high = float(low), float(high)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise InputError(f"heat from {low} to {high}: give two finite numbers, the lower first")
    anomaly_map = np.asarray(anomaly_map, np.float32)
    if np.isnan(anomaly_map).any():
        raise InputError(f"the anomaly map of {title or 'an image'} holds NaN: train it again")
    photograph = _fit(Image.fromarray(image))
    heat = _overlay(photograph, anomaly_map, low, high)
    if threshold is not None:
        heat = _outline(heat, np.asarray(_stretch(anomaly_map, heat.size)) > threshold)
    panels = [("image", photograph), ("anomaly map", heat)]
    if mask is not None:
        panels.append(
            (
                "defect" if mask.any() else "no defect",
                _outline(photograph, _shrink(mask, photograph.size)),
            )
        )
    return _compose(panels, _colour_bar(photograph.height, low, high, threshold), title)


def draw_strip(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    *,
    low: float,
    high: float,
    threshold: float,
    mask: np.ndarray | None = None,
    side: int = 160,
) -> Image.Image:
    """The same small, without gaps: photograph, heat, what is called defective, and the truth.

    Args:
      image: uint8 [H, W, 3].
      anomaly_map: [h, w], of any size; stretched over the image.
      low: as for `draw_heatmap`.
      high: likewise.
      threshold: of the map; pixels above it are called defective.
      mask: bool [H', W'], the truth; None where there is none, and then there are three pictures.
      side: pixels of a picture's longer side.
    """
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    photograph = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    pictures = [
        photograph,
        _overlay(photograph, anomaly_map, low, high),
        _silhouette(np.asarray(_stretch(anomaly_map, photograph.size)) > threshold, _CALLED),
    ]
    if mask is not None:
        pictures.append(_silhouette(_shrink(np.asarray(mask), photograph.size), _OUTLINE))
    return stack_pictures(pictures, columns=len(pictures))


def stack_pictures(pictures: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    """Several pictures as one, row by row, left-aligned."""
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
    """Write a PNG or WebP file, as its suffix says.

    In one step, so that an interrupted run leaves no broken picture.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        picture.save(part, format=path.suffix.removeprefix("."))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _fit(photograph: Image.Image) -> Image.Image:
    """The photograph with its longer side within the limits."""
    side = max(photograph.size)
    scale = min(max(side, _SIDES[0]), _SIDES[1]) / side
    if scale == 1:
        return photograph
    size = [max(1, round(length * scale)) for length in photograph.size]
    return photograph.resize(size, Image.Resampling.BICUBIC)


def _heat(values: np.ndarray, under: np.ndarray) -> np.ndarray:  # [..., 3] uint8
    """Lay the heat of values in [0, 1] over grey levels in [0, 255] of the same shape."""
    stops = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(values, stops, channel) for channel in _COLOURS.T], axis=-1)
    opacity = _OPACITY * np.sqrt(values)[..., None]
    return np.round(opacity * colours + (1 - opacity) * under[..., None]).astype(np.uint8)


def _overlay(
    photograph: Image.Image, anomaly_map: np.ndarray, low: float, high: float
) -> Image.Image:
    heat = (np.clip(anomaly_map, low, high) - low) / (high - low if high > low else 1)
    stretched = _stretch(heat, photograph.size)
    grey = np.asarray(photograph.convert("L"), np.float32)
    return Image.fromarray(_heat(np.asarray(stretched), grey))


def _stretch(anomaly_map: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """To `size` = (width, height)."""
    return Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)


def _outline(photograph: Image.Image, inside: np.ndarray) -> Image.Image:
    """The photograph with a line around a part, and a dark one around that for contrast."""
    border = np.ones_like(inside)
    border[2:-2, 2:-2] = False  # where a defect leaves the picture, its line runs along the edge
    outside = _grow(_grow(inside))
    line = (outside & ~inside) | (inside & border)
    pixels = np.array(photograph)
    pixels[_grow(outside) & ~outside] = 0
    pixels[line] = _OUTLINE
    return Image.fromarray(pixels)


def _shrink(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask in another (width, height), bool."""
    shares = Image.fromarray(mask.astype(np.float32))
    # Not the nearest pixel: a defect of a few must not vanish where a large image is shrunk.
    return np.asarray(shares.resize(size, Image.Resampling.BOX)) > 0


def _silhouette(mask: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    """The mask in a colour on dark ground."""
    return Image.fromarray(np.where(mask[..., None], colour, _NOTHING).astype(np.uint8))


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its neighbours, by one pixel."""
    padded = np.pad(mask, 1)
    return (
        mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    )  # [H, W]


def _colour_bar(
    height: int, low: float, high: float, threshold: float | None = None
) -> Image.Image:
    """The heat from bottom to top as it looks over mid-grey, with numbers to its right.

    The threshold is a line across it, at the end where it lies outside, and its number is darker.
    """
    font, texts = ImageFont.load_default(_CAPTION), ticks(low, high)
    limit = None if threshold is None else f"{threshold:.3g}"
    numbers = [*texts.values(), *([limit] if limit else [])]
    width = _BAR + 7 + math.ceil(max(font.getlength(text) for text in numbers))
    bar = Image.new("RGB", (width, height), _PAPER)
    values = np.broadcast_to(np.linspace(1, 0, height)[:, None], (height, _BAR))
    bar.paste(Image.fromarray(_heat(values, np.full(values.shape, 128.0))), (0, 0))
    draw, last = ImageDraw.Draw(bar), math.inf

    def place(value):  # of the value, and of the middle of its number
        part = (value - low) / (high - low) if high > low else 0
        y = (height - 1) * (1 - min(max(part, 0), 1))
        return y, min(max(y, _CAPTION / 2), height - _CAPTION / 2)

    taken = math.inf
    if limit:
        y, taken = place(threshold)
        y = min(max(y, 2), height - 3)
        draw.rectangle([(0, y - 2), (_BAR - 1, y + 2)], fill=(0, 0, 0))
        draw.rectangle([(0, y - 1), (_BAR + 3, y + 1)], fill=_OUTLINE)
        draw.text((_BAR + 7, taken), limit, fill=_INK, font=font, anchor="lm")
    for value, text in texts.items():
        y, middle = place(value)
        # A low picture has no room for all.
        if last - middle >= _CAPTION and abs(middle - taken) >= _CAPTION:
            draw.line([(_BAR, y), (_BAR + 3, y)], fill=_FAINT)
            draw.text((_BAR + 7, middle), text, fill=_FAINT, font=font, anchor="lm")
            last = middle
    return bar


def _compose(panels: list[tuple[str, Image.Image]], bar: Image.Image, title: str) -> Image.Image:
    """Panels from left to right under a title, each with its caption below, and the bar."""
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
