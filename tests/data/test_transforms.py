"""Decoding, resizing and normalisation, compared with Pillow, numpy and torchvision."""

import importlib.util
import io
import struct
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image, ImageDraw
from scipy import ndimage
from torchvision_oracle import import_torchvision

from fastflow_jax.data.formats import read_header
from fastflow_jax.data.transforms import (
    check_image,
    convert_image,
    decode_image,
    decode_mask,
    normalise,
    placement,
    resize,
    resize_mask,
    seen_part,
)
from fastflow_jax.errors import InputError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 7, 3), np.uint8)  # [H, W, 3]
GREY = RNG.integers(0, 256, (5, 7), np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7), np.uint8)
GREY16 = RNG.integers(0, 2**16, (5, 7), np.uint16)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(bit_depth, colour_type, rows, *chunks):
    """PNG file of a kind that Pillow does not write."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    height, width = rows.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(*each) for each in chunks)
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


def tiff12(values):
    """A 12-bit grey TIFF: two pixels in three bytes, rows padded to bytes."""
    rows = []
    for row in values:
        bits = "".join(f"{value:012b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        rows.append(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    return grey_tiff(values.shape, 12, 1, b"".join(rows))


def grey_tiff(size, bits, photometric, pixels):
    """TIFF file of a kind that Pillow does not write."""
    height, width = size
    short, long = 3, 4
    tags = [
        (256, short, width),
        (257, short, height),
        (258, short, bits),
        (259, short, 1),
        (262, short, photometric),
        (273, long, 8),
        (277, short, 1),
        (278, short, height),
        (279, long, len(pixels)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + directory


def repeat(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def over_black(colour, alpha):
    return np.round(colour * (alpha[..., None] / 255.0))


def with_alpha(colour):
    return Image.fromarray(np.dstack([colour, ALPHA]))


def palette_image(transparency=None):
    image = Image.fromarray(GREY % 3).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([255, 0, 0, 0, 200, 0, 10, 20, 30])
    options = {} if transparency is None else {"transparency": transparency}
    return encode(image, **options)


PALETTE = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 30]])

DECODED = {
    "colour": (encode(Image.fromarray(COLOUR)), COLOUR),
    "colour in a BMP": (encode(Image.fromarray(COLOUR), "BMP"), COLOUR),
    "grey": (encode(Image.fromarray(GREY)), repeat(GREY)),
    "1-bit": (encode(Image.fromarray(GREY > 99)), repeat((GREY > 99) * 255)),
    "palette": (palette_image(), PALETTE[GREY % 3]),
    "palette, a colour transparent": (
        palette_image(transparency=1),
        np.where(GREY[..., None] % 3 == 1, 0, PALETTE[GREY % 3]),
    ),
    "palette, an alpha a colour": (
        palette_image(transparency=bytes([255, 100, 0])),
        over_black(PALETTE[GREY % 3], np.array([255, 100, 0])[GREY % 3]),
    ),
    "alpha": (encode(with_alpha(COLOUR)), over_black(COLOUR, ALPHA)),
    "grey and alpha": (
        encode(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])),
        over_black(repeat(GREY), ALPHA),
    ),
    "grey, one level transparent": (
        encode(Image.fromarray(GREY), transparency=int(GREY[2, 3])),
        repeat(np.where(GREY[2, 3] == GREY, 0, GREY)),
    ),
    "16-bit grey PNG": (encode(Image.fromarray(GREY16)), repeat(GREY16 >> 8)),
    "16-bit grey TIFF": (encode(Image.fromarray(GREY16), "TIFF"), repeat(GREY16 >> 8)),
    "16-bit grey TIFF, big-endian": (
        encode(Image.frombytes("I;16B", (7, 5), GREY16.astype(">u2").tobytes()), "TIFF"),
        repeat(GREY16 >> 8),
    ),
    "16-bit grey PGM": (
        b"P5 7 5 65535\n" + GREY16.astype(">u2").tobytes(),
        repeat(GREY16 >> 8),
    ),
    "16-bit colour PNG": (
        png(16, 2, np.dstack([GREY16, GREY16 // 2, GREY16 // 3]).astype(">u2")),
        np.dstack([GREY16, GREY16 // 2, GREY16 // 3]) >> 8,
    ),
    "16-bit grey TIFF, white is zero": (
        grey_tiff((5, 7), 16, 0, GREY16.tobytes()),
        repeat(255 - (GREY16 >> 8)),
    ),
    "12-bit grey TIFF": (tiff12(GREY16 >> 4), repeat(GREY16 >> 8)),
}


@pytest.mark.parametrize("kind", DECODED)
def test_decode_image_gives_rgb(kind):
    data, expected = DECODED[kind]
    image = decode_image(data)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)


def test_cmyk_jpeg_becomes_rgb():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image = decode_image(encode(ink, "JPEG", quality=95))
    np.testing.assert_allclose(image, np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=4)


# EXIF orientation -> transformation of the stored pixels for display (EXIF 2.3, section 4.6.4).
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind, tmp_path):
    blocks = np.kron(COLOUR[:2, :3], np.ones((16, 16, 1), np.uint8))  # [32, 48, 3]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "JPEG":
        options = {"quality": 100, "subsampling": 0}
    path = tmp_path / "image"
    path.write_bytes(encode(Image.fromarray(blocks), kind, exif=exif, **options))

    expected = TURNED[orientation](blocks)
    image = decode_image(path.read_bytes())
    assert image.shape == expected.shape
    np.testing.assert_allclose(image.astype(int), expected, atol=3 if kind == "JPEG" else 0)
    assert read_header(path).size == expected.shape[:2]
    mask = encode(Image.fromarray(blocks[..., 0] > 99), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_mask(mask), expected[..., 0] > 99)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_rotated_tiff_is_the_same_from_file_or_pillow(mode, tmp_path):
    image = Image.fromarray(GREY16) if mode == "I;16" else Image.fromarray(COLOUR).convert(mode)
    path = tmp_path / "turned.tif"
    image.save(path, tiffinfo={274: 6})
    expected = decode_image(path.read_bytes())
    assert expected.shape == (7, 5, 3)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(convert_image(opened), expected)


def test_the_header_finds_an_orientation_in_the_xmp_of_a_png(tmp_path):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = b"XML:com.adobe.xmp" + bytes(5) + xmp
    path = tmp_path / "turned.png"
    path.write_bytes(png(8, 2, COLOUR, (b"iTXt", text)))
    np.testing.assert_array_equal(decode_image(path.read_bytes()), np.rot90(COLOUR, -1))
    assert read_header(path).size == (7, 5)


def test_planar_16_bit_channels_are_refused():
    with Image.open(io.BytesIO(encode(Image.fromarray(COLOUR), "TIFF"))) as image:
        image.load()
        image.tag_v2[258], image.tag_v2[284] = (16, 16, 16), 2
        with pytest.raises(InputError, match=r"planes\.tif has planar channels"):
            convert_image(image, "planes.tif")


def test_image_size_is_height_and_width(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encode(Image.fromarray(COLOUR)))
    assert read_header(path).size == (5, 7)


DEFECTIVE = GREY > 128
PALETTE_MASK = Image.frombytes("P", (7, 5), DEFECTIVE.astype(np.uint8).tobytes())
PALETTE_MASK.putpalette([0, 0, 0, 128, 0, 0])
MASKS = {
    "0 and 255": encode(Image.fromarray(DEFECTIVE * np.uint8(255))),
    "0 and 1": encode(Image.fromarray(DEFECTIVE * np.uint8(1))),
    "1-bit": encode(Image.fromarray(DEFECTIVE)),
    "a colour": encode(Image.fromarray(DEFECTIVE[..., None] * np.array([0, 90, 9], np.uint8))),
    "palette": encode(PALETTE_MASK),
    "white on transparent": encode(
        Image.fromarray(np.dstack([np.full((5, 7, 3), 255, np.uint8), DEFECTIVE * np.uint8(255)]))
    ),
    "black on transparent": encode(
        Image.fromarray(np.dstack([np.zeros((5, 7, 3), np.uint8), DEFECTIVE * np.uint8(255)]))
    ),
    "16 bits, low byte only": encode(Image.fromarray(DEFECTIVE * np.uint16(3))),
    "32 bits": encode(Image.fromarray(DEFECTIVE * np.int32(7)), "TIFF"),
    "floats": encode(Image.fromarray(DEFECTIVE * np.float32(0.5)), "TIFF"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_decode_mask_marks_pixels_that_are_not_black(kind):
    mask = decode_mask(MASKS[kind])
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, DEFECTIVE)


@pytest.mark.parametrize("alpha", [0, 255])
def test_a_black_mask_of_one_transparency_has_no_defect(alpha):
    data = encode(Image.new("RGBA", (7, 5), (0, 0, 0, alpha)))
    assert not decode_mask(data).any()


def test_decode_mask_ignores_jpeg_noise():
    blocks = np.kron(DEFECTIVE, np.ones((21, 21), bool))
    data = encode(Image.fromarray(blocks * np.uint8(255)), "JPEG", quality=30)
    noisy = np.asarray(Image.open(io.BytesIO(data)))
    assert ((noisy > 0) != blocks).any(), "the noise that this test is about"
    np.testing.assert_array_equal(decode_mask(data), blocks)


def drawn(shapes, size=(240, 320), mode="L"):
    """A mask of shapes: (method of ImageDraw, corners, level or colour)."""
    image = Image.new(mode, size[::-1])
    for method, corners, level in shapes:
        getattr(ImageDraw.Draw(image), method)(corners, fill=level)
    return image


DEFECTS = drawn(
    [
        ("ellipse", (30, 40, 130, 90), 255),
        ("rectangle", (200, 31, 211, 42), 255),
        ("line", (20, 200, 300, 130), 255),
        ("ellipse", (220, 180, 226, 184), 255),
    ]
)
# Each label fills an area: instances, PASCAL VOC classes with a void border, grey classes.
AREAS = [(20 + 45 * (i % 6), 20 + 50 * (i // 6)) for i in range(24)]
LABELS = {
    "instances 1 to 20": range(1, 21),
    "instances 1 to 240": range(1, 241, 12),
    "classes and void": (1, 2, 7, 15, 20, 255),
    "grey classes": (50, 100, 150, 200, 250),
    "bright classes": range(236, 256),
}


def iou(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


def passed_through(mask, kind, **options):
    """Returns the mask as PNG, after saving it in a lossy format."""
    lossy = Image.open(io.BytesIO(encode(mask, kind, **options)))
    return encode(lossy.convert("RGB" if mask.mode == "RGB" else "L"))


LOSSY = {
    "JPEG 30": ("JPEG", {"quality": 30}),
    "JPEG 75": ("JPEG", {"quality": 75}),
    "JPEG 95": ("JPEG", {"quality": 95}),
    "JPEG 100": ("JPEG", {"quality": 100}),
    "WebP 80": ("WEBP", {"quality": 80}),
    "WebP 30": ("WEBP", {"quality": 30}),
    "TIFF with JPEG": ("TIFF", {"compression": "jpeg"}),
    "JPEG 2000": ("JPEG2000", {"quality_mode": "rates", "quality_layers": [20]}),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_decode_mask_cuts_the_halo_of_lossy_formats(kind):
    format, options = LOSSY[kind]
    truth, cut = np.asarray(DEFECTS) > 0, []
    again = passed_through(DEFECTS, format, **options)
    assert iou(decode_mask(again, "a.png", on_cut=cut.append), truth) >= 0.98
    lossy = encode(DEFECTS, format, **options)
    assert iou(decode_mask(lossy, "a.png", on_cut=cut.append), truth) >= 0.98
    assert set(cut) <= {"a.png"}
    if kind in ("JPEG 75", "WebP 80", "TIFF with JPEG"):
        assert cut == ["a.png"] * 2


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("factor", [0.4, 1.5, 3])
def test_decode_mask_cuts_the_halo_of_resizing(factor, bits):
    size = (round(320 * factor), round(240 * factor))
    resized = DEFECTS.resize(size, Image.Resampling.BICUBIC)
    truth = np.asarray(resized) > 127
    if bits == 16:
        resized = Image.fromarray(np.asarray(resized) * np.uint16(257))
    assert iou(decode_mask(encode(resized)), truth) >= 0.98


@pytest.mark.parametrize("kind", ["alpha", "floats", "32 bits"])
def test_decode_mask_cuts_antialiased_masks_of_any_mode(kind):
    soft = np.asarray(DEFECTS.resize((160, 120), Image.Resampling.BOX))
    if kind == "alpha":
        data = encode(Image.fromarray(np.dstack([np.full((*soft.shape, 3), 255, np.uint8), soft])))
    elif kind == "floats":
        data = encode(Image.fromarray(soft / np.float32(255)), "TIFF")
    else:
        data = encode(Image.fromarray(soft * np.int32(257)), "TIFF")
    np.testing.assert_array_equal(decode_mask(data), soft >= 127)


def test_a_thin_antialiased_line_stays_connected():
    large = drawn([("line", (100, 90, 1700, 1400), 255)], size=(1500, 2000))
    soft = np.asarray(large.resize((200, 150)))
    assert 0 < soft.max() < 127, "a line this faint is not cut"
    np.testing.assert_array_equal(decode_mask(encode(Image.fromarray(soft))), soft > 0)
    bright = (soft.astype(np.uint16) * 255 // soft.max()).astype(np.uint8)
    line = decode_mask(encode(Image.fromarray(bright)))
    assert line.sum() < (soft > 0).sum()
    assert ndimage.label(line, np.ones((3, 3)))[1] == 1


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", LABELS)
def test_decode_mask_keeps_labels_of_any_level(kind, bits):
    places = zip(AREAS, LABELS[kind], strict=False)
    labels = drawn(
        [
            (("ellipse", "rectangle")[i % 2], (x, y, x + 10 + i, y + 12), level)
            for i, ((x, y), level) in enumerate(places)
        ]
    )
    truth, cut = np.asarray(labels) > 0, []
    if bits == 16:
        labels = Image.fromarray(np.asarray(labels).astype(np.uint16))
    np.testing.assert_array_equal(decode_mask(encode(labels), on_cut=cut.append), truth)
    assert cut == []


COLOURS = [(128, 0, 0), (0, 128, 0), (64, 0, 0), (192, 128, 128), (0, 64, 0), (255, 255, 255)]


@pytest.mark.parametrize("lossy", [False, True])
def test_colours_of_classes_are_defective_before_and_after_a_lossy_format(lossy):
    shapes = [
        ("rectangle", (10 + 50 * i, 20 + 20 * i, 50 + 50 * i, 80 + 20 * i), colour)
        for i, colour in enumerate(COLOURS)
    ]
    classes = drawn(shapes, mode="RGB")
    truth = np.asarray(classes).any(-1)
    data = passed_through(classes, "JPEG", quality=75) if lossy else encode(classes)
    mask = decode_mask(data)
    assert iou(mask, truth) >= (0.9 if lossy else 1)
    for _, (left, top, right, bottom), _ in shapes:
        assert mask[top + 4 : bottom - 3, left + 4 : right - 3].all()


def test_a_truncated_image_is_named():
    data = encode(Image.fromarray(np.tile(GREY, (9, 9))), "JPEG")
    with pytest.raises(InputError, match=r"^a/b\.jpg is broken .*truncated.*Replace or remove it"):
        decode_image(data[:-200], "a/b.jpg")


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_not_an_image_is_named(data):
    with pytest.raises(InputError, match=r"^a/b\.png is not an image that Pillow can read"):
        decode_image(data, "a/b.png")


@pytest.mark.parametrize(
    ("array", "kind"), [(GREY.astype(np.float32), "floats"), (GREY.astype(np.int32), "32-bit")]
)
def test_values_without_a_known_white_level_are_refused(array, kind):
    with pytest.raises(InputError, match=rf"^x\.tif has {kind}.*Save it with 8 or 16"):
        decode_image(encode(Image.fromarray(array), "TIFF"), "x.tif")


@pytest.mark.parametrize("limit", [34, 20, 10])  # Pillow raises above twice the limit
def test_a_decompression_bomb_is_named_with_its_size(limit, monkeypatch):
    data = encode(Image.fromarray(COLOUR))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=r"^big\.png is too large: .*Resize it"):
        decode_image(data, "big.png")


@pytest.mark.filterwarnings("default")
def test_a_large_image_is_refused_when_pillow_only_warns(monkeypatch):
    data = encode(Image.fromarray(COLOUR))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(InputError, match="7 x 5 pixels exceed the limit of 34 pixels"),
    ):
        decode_image(data, "big.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_check_image_finds_truncated_files(kind):
    data = encode(Image.fromarray(np.tile(COLOUR, (9, 9, 1))), kind)
    check_image(data, "whole")
    with pytest.raises(InputError, match=r"^cut off is "):
        check_image(data[: len(data) * 2 // 3], "cut off")


def test_check_image_finds_damaged_pixels():
    data = bytearray(encode(Image.fromarray(COLOUR)))
    data[data.index(b"IDAT") + 20] ^= 1
    with pytest.raises(InputError, match=r"^it is broken"):
        check_image(bytes(data), "it")


def bilinear(image, size):
    """Antialiased bilinear resizing in float64, by a triangle as wide as the scale factor."""
    for axis, n in enumerate(size):
        scale = image.shape[axis] / n
        support = max(scale, 1.0)
        centres = (np.arange(n) + 0.5) * scale
        distance = np.abs(np.arange(image.shape[axis]) + 0.5 - centres[:, None]) / support
        weights = np.clip(1 - distance, 0, None)
        weights /= weights.sum(axis=1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    return image


SIZES = [(8, 8), (23, 31), (61, 40), (5, 100)]


@pytest.mark.parametrize("size", SIZES)
def test_resize_is_antialiased_bilinear_within_a_grey_level(size):
    image = RNG.integers(0, 256, (40, 57, 3), np.uint8)
    resized = resize(image, size)
    assert resized.dtype == np.uint8
    np.testing.assert_allclose(resized.astype(float), bilinear(image, size), atol=1)


@pytest.mark.parametrize("size", SIZES)
def test_resize_equals_torchvision(size, torchvision):
    image = RNG.integers(0, 256, (40, 57, 3), np.uint8)
    mask = image[..., 0] > 128
    modes = torchvision.transforms.InterpolationMode
    theirs = torchvision.transforms.Resize(size)(Image.fromarray(image))
    np.testing.assert_array_equal(resize(image, size), np.asarray(theirs))
    theirs = torchvision.transforms.Resize(size, modes.NEAREST)(Image.fromarray(mask))
    np.testing.assert_array_equal(resize_mask(mask, size), np.asarray(theirs))


@pytest.mark.parametrize("size", [*SIZES, (40, 57)])
def test_floor_and_threshold_equal_torchvision(size, torchvision):
    """As in the PyTorch code: resized like an image, then astype(int) or a comparison."""
    mask = np.kron(RNG.random((5, 7)) > 0.5, np.ones((8, 8), bool))[:, :-1]
    transforms = torchvision.transforms
    resize_and_scale = transforms.Compose([transforms.Resize(size), transforms.ToTensor()])
    shares = resize_and_scale(Image.fromarray(mask * np.uint8(255)))[0].numpy()
    np.testing.assert_array_equal(resize_mask(mask, size, "floor"), shares.astype(int))
    np.testing.assert_array_equal(resize_mask(mask, size, "threshold"), shares >= 0.5)


def test_floor_erodes_and_threshold_keeps_the_area():
    mask = np.zeros((90, 90), bool)
    mask[20:53, 20:53] = True
    floor, threshold = (resize_mask(mask, (30, 30), how) for how in ("floor", "threshold"))
    assert floor.sum() < threshold.sum()
    assert not (floor & ~threshold).any()
    assert threshold.sum() == pytest.approx(mask.sum() / 9, rel=0.1)
    assert floor[8:16, 8:16].all()


@pytest.mark.parametrize("side", [8, 23, 61])
@pytest.mark.parametrize("size", [(40, 57), (57, 40), (40, 40), (7, 300), (61, 62)])
def test_crop_equals_torchvision(size, side, torchvision):
    image = RNG.integers(0, 256, (*size, 3), np.uint8)
    transforms = torchvision.transforms
    theirs = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])
    resized, crop, place = placement(size, (side, side), "crop")
    np.testing.assert_array_equal(
        resize(image, resized)[crop], np.asarray(theirs(Image.fromarray(image)))
    )
    assert place == (slice(0, side), slice(0, side))


lengths = st.integers(1, 400)


@given(st.tuples(lengths, lengths), st.tuples(lengths, lengths))
def test_crop_fills_the_input_and_pad_shows_the_whole_image(size, target):
    scales = [b / a for a, b in zip(size, target, strict=True)]
    for how, scale in (("crop", max(scales)), ("pad", min(scales))):
        resized, crop, place = placement(size, target, how)
        # Both sides have one scale, up to rounding.
        for old, new in zip(size, resized, strict=True):
            assert new == 1 or scale * old - 1 <= new <= scale * old + 1e-6
        assert any(a == b for a, b in zip(resized, target, strict=True))
        shapes = [[s.stop - s.start for s in slices] for slices in (crop, place)]
        assert shapes[0] == shapes[1] == list(target if how == "crop" else resized)
        for slices, outer in ((crop, resized), (place, target)):
            for part, length in zip(slices, outer, strict=True):
                assert 0 <= part.start < part.stop <= length
                assert abs(part.start - (length - part.stop)) <= 1  # centred
        seen = seen_part(np.zeros(size), placement(size, target, how))
        assert seen.shape == size if how == "pad" else seen.size > 0


def test_square_stretches_the_image_over_the_input():
    whole = (slice(0, 8), slice(0, 6))
    assert placement((50, 20), (8, 6), "square") == ((8, 6), whole, whole)


@pytest.fixture(scope="module")
def torchvision():
    for package in ("torch", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: the oracle of these tests")
    return import_torchvision()


@pytest.mark.parametrize("size", SIZES)
def test_resize_mask_takes_the_nearest_pixel(size):
    mask = RNG.random((40, 57)) > 0.5
    rows, columns = (
        ((np.arange(n) + 0.5) * old / n).astype(int)
        for n, old in zip(size, mask.shape, strict=True)
    )
    resized = resize_mask(mask, size)
    assert resized.dtype == bool
    np.testing.assert_array_equal(resized, mask[np.ix_(rows, columns)])


def test_resize_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(resize(COLOUR, (5, 7)), COLOUR)


def test_normalise():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = normalise(COLOUR, mean, std)
    assert normalised.dtype == np.float32
    expected = (COLOUR.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(normalised, expected, atol=1e-6)
