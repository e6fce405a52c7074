"""Images of more than 8 bits: stated depths and windows, compared with numpy."""

import io
import logging
import re
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastflow_jax.data import open_dataset
from fastflow_jax.data.arrays import as_dataset, each
from fastflow_jax.data.levels import Levels
from fastflow_jax.data.transforms import decode_image, decode_stored
from fastflow_jax.errors import InputError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 4096, (9, 7), np.uint16)
COLOUR = RNG.integers(0, 4096, (9, 7, 3), np.uint16)
FLOAT = RNG.normal(5, 2, (9, 7)).astype(np.float32)
BITS = Levels(0, 4096, bits=12)
WINDOW = Levels(100, 3100, window=(1, 99))


def png(values):
    """PNG file of 16 bits per channel, which Pillow writes for grey images only."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    height, width = values.shape[:2]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[values[0, 0].size]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(values, **options):
    file = io.BytesIO()
    kind = "rgb" if values.ndim == 3 and values.shape[-1] in (3, 4) else "minisblack"
    tifffile.imwrite(file, values, **{"photometric": kind} | options)
    return file.getvalue()


def pgm(values, highest):
    height, width = values.shape
    return f"P5 {width} {height} {highest}\n".encode() + values.astype(">u2").tobytes()


def three(values):
    return values if values.ndim == 3 else np.stack([values] * 3, -1)


FILES = {
    "png, grey": (png(GREY), GREY),
    "png, colour": (png(COLOUR), COLOUR),
    "tiff, grey": (tiff(GREY), GREY),
    "tiff, big-endian": (tiff(GREY, byteorder=">"), GREY),
    "tiff, colour": (tiff(COLOUR), COLOUR),
    "tiff, colour, big-endian": (tiff(COLOUR, byteorder=">"), COLOUR),
    "tiff, colour, compressed": (tiff(COLOUR, compression="zlib", predictor=True), COLOUR),
    "pgm": (pgm(GREY, 65535), GREY),
    "pgm of 12 bits": (pgm(GREY, 4095), GREY),
}


@pytest.mark.parametrize("kind", FILES)
def test_stored_values_are_exact(kind):
    data, values = FILES[kind]
    np.testing.assert_array_equal(decode_stored(data), values)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("bits", [10, 12])
def test_a_stated_depth_keeps_the_highest_eight_bits_and_clips(kind, bits):
    data, values = FILES[kind]
    expected = np.minimum(values // 2 ** (bits - 8), 255)
    found = decode_image(data, levels=Levels(0, 2**bits, bits=bits))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, three(expected))


@pytest.mark.parametrize("values", [GREY * 16, COLOUR * 16], ids=["grey", "colour"])
def test_sixteen_bits_are_the_high_byte_as_without_a_depth(values):
    found = decode_image(png(values), levels=Levels(0, 2**16, bits=16))
    np.testing.assert_array_equal(found, decode_image(png(values)))


@pytest.mark.parametrize(
    "values",
    [GREY, COLOUR, (GREY.astype(np.int32) - 2000) * 1000, FLOAT],
    ids=["grey", "colour", "int32", "float32"],
)
def test_a_window_is_linear_between_its_levels(values):
    low, high = np.percentile(values, (5, 95))
    found = decode_image(tiff(values), levels=Levels(low, high, window=(5, 95)))
    exact = (values.astype(np.float64) - low) / (high - low) * 256
    np.testing.assert_array_equal(found[three(values < low)], 0)
    np.testing.assert_array_equal(found[three(values >= high)], 255)
    inside = three((values >= low) & (values < high))
    assert (np.abs(found + 0.5 - three(exact))[inside] < 0.51).all()


def test_values_that_are_not_finite_are_black_or_white():
    values = np.array([[np.nan, -np.inf, np.inf, 1.0]], np.float32)
    found = decode_image(tiff(values), levels=Levels(0, 2, window=(1, 99)))
    assert found[0, :, 0].tolist() == [0, 0, 255, 128]


def test_transparent_colours_become_black():
    alpha = np.full((9, 7, 1), 65535, np.uint16)
    alpha[:3], alpha[3:6] = 0, 32768
    found = decode_stored(png(np.concatenate([COLOUR, alpha], -1)))
    np.testing.assert_allclose(found, COLOUR * (alpha / 65535), atol=0.51)


@pytest.mark.parametrize(
    ("data", "levels", "says"),
    [
        (tiff(FLOAT), None, "has floats, whose white level is unknown.*window=(1,99)"),
        (tiff(FLOAT), BITS, "has floats, whose white level is unknown"),
        (tiff(GREY.astype(np.int32)), BITS, "has 32-bit or signed integers"),
        (tiff((GREY // 16).astype(np.uint8)), WINDOW, "has 8 bits per channel"),
        (png(np.stack([GREY, GREY], -1)), BITS, "has 16 bits per channel of the kind LA"),
        (b"P6 1 1 4095\n" + bytes(6), BITS, "is a PPM file of 16 bits"),
    ],
)
def test_values_that_cannot_be_mapped_are_refused(data, levels, says):
    with pytest.raises(InputError, match="^x " + ".*".join(map(re.escape, says.split(".*")))):
        decode_image(data, "x", levels=levels)


def test_eight_bits_are_unchanged_by_a_depth():
    data = tiff((GREY // 16).astype(np.uint8))
    np.testing.assert_array_equal(decode_image(data, levels=BITS), decode_image(data))


def test_the_first_clipped_image_is_named(caplog):
    levels = Levels(0, 1024, bits=10)
    with caplog.at_level(logging.WARNING, "fastflow_jax"):
        for name in ("a.png", "b.png"):
            decode_image(png(GREY), name, levels=levels)
    (message,) = caplog.messages
    assert message.startswith(f"a.png has levels up to {GREY.max()}, and config.data.bits=10 ends")


def test_a_turned_pillow_image_has_its_levels(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn clockwise
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    for is_loaded in (False, True):
        with Image.open(tmp_path / "a.png") as image:
            if is_loaded:
                image.load()
            (given,) = each(image, BITS)
        np.testing.assert_array_equal(given.array, three(np.rot90(GREY // 16, -1)))


@pytest.mark.parametrize("array", [GREY, COLOUR], ids=["grey", "colour"])
def test_arrays_of_16_bits_need_a_depth(array):
    (given,) = each([array], BITS)
    np.testing.assert_array_equal(given.array, three(array // 16))
    (given,) = each([array])
    with pytest.raises(InputError, match=r"is an array of uint16.*--config\.data\.bits=12"):
        given.pages()


@pytest.mark.parametrize("channels", [2, 5, 8])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_other_numbers_of_channels_are_refused(channels, dtype):
    values = np.zeros((16, 16, channels), dtype)
    (given,) = each([values], BITS)
    says = f"has {channels} channels, and images must be grey or RGB. Choose or compute three"
    with pytest.raises(InputError, match=f"^image 0 {says}"):
        given.pages()
    for kind in ("minisblack", "rgb")[: 1 + (channels > 4)]:
        data = tiff(values, photometric=kind, planarconfig="contig")
        with pytest.raises(InputError, match=f"^x {says}"):
            decode_image(data, "x")


def test_a_bayer_mosaic_is_refused():
    tags = [(33421, "H", 2, (2, 2), True), (33422, "B", 4, (0, 1, 1, 2), True)]
    data = tiff(GREY, photometric="cfa", extratags=tags)
    with pytest.raises(InputError, match=r"^x has the mosaic of a Bayer sensor.*COLOR_BayerRG2RGB"):
        decode_image(data, "x")


@pytest.fixture
def images(tmp_path):
    """Three training images, one of two pages, and a brighter test image."""
    values = [RNG.integers(200 * i, 1500, (2, 9, 7), np.uint16) for i in range(3)]
    for split in ("train", "test"):
        (tmp_path / split / "good").mkdir(parents=True)
    (tmp_path / "train/good/0.tif").write_bytes(tiff(values[0]))
    for i in (1, 2):
        (tmp_path / f"train/good/{i}.png").write_bytes(png(values[i][0]))
    (tmp_path / "test/good/0.png").write_bytes(png(values[0][0] * 2))
    return tmp_path, [values[0][0], values[0][1], values[1][0], values[2][0]]


def test_all_images_have_the_levels_of_the_training_images(images, data_config):
    root, values = images
    dataset = open_dataset(data_config("folder", root=str(root), window=(2, 98)))
    low, high = np.percentile(values, (2, 98))
    assert (dataset.levels.black, dataset.levels.white) == pytest.approx((low, high))
    known = data_config("folder", root=str(root), window=(2, 98), levels=(low, high))
    for found in (dataset, open_dataset(known)):
        assert [*found.train.names] == ["good/0.tif#1", "good/0.tif#2", "good/1.png", "good/2.png"]
        for i, stored in enumerate([*values, 2 * values[0]]):
            image = found.train[i].image if i < 4 else found.test[0].image
            expected = Levels(low, high, window=(2, 98)).apply(stored, "x")
            np.testing.assert_array_equal(image, three(expected))


def test_given_arrays_have_the_window_of_all_of_them():
    values = [FLOAT + i for i in range(3)]
    dataset = as_dataset(values, levels=Levels(window=(10, 90)))
    low, high = np.percentile([three(each) for each in values], (10, 90))
    assert (dataset.levels.black, dataset.levels.white) == pytest.approx((low, high))
    for i, stored in enumerate(values):
        expected = dataset.levels.apply(stored, "x")
        np.testing.assert_array_equal(dataset.train[i].image, three(expected))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.full((4, 4), 7, np.uint16), r"percentiles 1 and 99 of the training images are both 7"),
        (np.full((4, 4), np.nan, np.float32), "have no finite values"),
        (np.zeros((4, 4), np.uint8), r"image 0 has 8 bits per channel, and config.data.window is"),
    ],
)
def test_a_window_of_unsuitable_images_is_refused(values, says):
    with pytest.raises(InputError, match=says):
        as_dataset([values], levels=Levels(window=(1, 99)))
