"""Recognition of image files, headers, and error messages for unreadable files."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from fastflow_jax.data.formats import is_image, read_header
from fastflow_jax.data.layout import find_images
from fastflow_jax.data.transforms import decode_image, decode_mask
from fastflow_jax.errors import InputError

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8))


def encoded(kind="PNG", **options):
    file = io.BytesIO()
    IMAGE.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.png", b"broken", True),
        ("a.JPG", encoded("JPEG"), True),
        ("frame_3", encoded(), True),
        ("a.jpg_large", encoded("JPEG"), True),
        ("a.img", encoded(), True),
        ("a.dng", b"II*\0", True),
        ("a.HEIC", b"\0\0\0\x18ftypheic", True),
        ("clip.mp4", b"\0\0\0\x18ftypmp42", True),
        ("frame_4", b"\x80\0\1 binary", True),
        ("empty", b"", True),
        ("notes.txt", b"good part", False),
        ("labels.csv", b"a,b", False),
        ("README", "Prüfteile vom Band\n".encode(), False),
        ("long", "ä".encode() * 5000, False),
        ("images.zip", b"PK\3\4", False),
        ("IMG_1.AAE", b"<?xml version='1.0'?>", False),
    ],
)
def test_images_are_recognised_by_extension_and_by_content(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert is_image(tmp_path / name) is expected


def test_links_to_missing_files_count_as_images(tmp_path):
    for name in ("a.png", "frame", "notes.txt"):
        (tmp_path / name).symlink_to(tmp_path / "not mounted" / name)
    assert [path.name for path in find_images(tmp_path).images] == ["a.png", "frame"]
    with pytest.raises(InputError, match=r"frame is a link to a missing file\. Restore"):
        read_header(tmp_path / "frame")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jpg", b"\0\0\0\x18ftypheicx", "HEIC.*pillow-heif"),
        ("a.jxl", b"\xff\x0a....", "JPEG XL.*pillow-jxl-plugin"),
        ("a.png", b"\0" * 128 + b"DICM", "DICOM"),
        ("a.mp4", b"\0\0\0\x18ftypisom", "a video.*frames"),
        ("a.cr3", b"\0\0\0\x18ftypcrx ", "camera raw.*Convert it to PNG or TIFF"),
        ("a.ARW", b"nothing known", "camera raw.*Convert it to PNG or TIFF"),
        ("a.png", b"nothing known", "not an image that Pillow can read"),
        ("a.png", b"", "not an image that Pillow can read"),
    ],
)
def test_unreadable_formats_are_named_with_a_remedy(tmp_path, name, content, says, monkeypatch):
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "HEIF"})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / name))} is .*{says}"):
        decode_image((tmp_path / name).read_bytes(), str(tmp_path / name))
    with pytest.raises(InputError, match=says):
        read_header(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("a.dng", {}),
        ("a.nef", {}),
        ("renamed.tif", {50706: b"\1\4\0\0"}),
    ],
)
def test_camera_raw_is_not_decoded_as_its_thumbnail(tmp_path, name, tags):
    IMAGE.convert("L").save(tmp_path / name, "TIFF", tiffinfo=tags)
    with pytest.raises(InputError, match=r"is camera raw, which Pillow cannot read\. Convert it"):
        read_header(tmp_path / name)


def test_heic_is_read_if_the_plugin_is_installed(tmp_path):
    pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    import fastflow_jax.data.formats  # noqa: F401  registers it

    IMAGE.resize((64, 48)).save(tmp_path / "a.heic", quality=90)
    header = read_header(tmp_path / "a.heic")
    assert (header.format, header.size, header.pages) == ("HEIF", (48, 64), 1)
    decoded = decode_image((tmp_path / "a.heic").read_bytes())
    assert np.abs(decoded.astype(int) - np.asarray(IMAGE.resize((64, 48)))).mean() < 20


@pytest.mark.parametrize("quality", [30, 50, 60, 75, 85, 90, 95, 100])
@pytest.mark.parametrize("kind", ["RGB", "L"])
def test_the_quality_of_jpeg_files_is_estimated(tmp_path, quality, kind):
    IMAGE.convert(kind).save(tmp_path / "a.jpg", quality=quality)
    assert read_header(tmp_path / "a.jpg").quality == pytest.approx(quality, abs=1)


def test_pages_are_images_and_previews_are_not(tmp_path):
    shades = [Image.new("L", (8, 6), 40 * i) for i in range(4)]
    later = {"save_all": True, "append_images": shades[1:]}
    shades[0].save(tmp_path / "stack.tif", **later)
    shades[0].convert("RGB").save(tmp_path / "a.png", **later)
    shades[0].convert("RGB").save(tmp_path / "a.webp", lossless=True, **later)
    shades[0].save(tmp_path / "a.gif", **later)
    for path in sorted(tmp_path.iterdir()):
        assert read_header(path).pages == 4
        found = [int(decode_image(path.read_bytes(), page=i).mean()) for i in range(4)]
        assert found == [0, 40, 80, 120], path
        assert [decode_mask(path.read_bytes(), page=i).all() for i in range(4)] == [0, 1, 1, 1]
    shades[0].save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=shades[1:])
    assert read_header(tmp_path / "photo.jpg").pages == 1


def test_reduced_copies_in_a_tiff_are_not_pages(tmp_path):
    full, small = Image.new("L", (8, 6), 10), Image.new("L", (4, 3), 200)
    small.encoderinfo = {"tiffinfo": {254: 1}}
    full.save(tmp_path / "pyramid.tif", save_all=True, append_images=[small, full])
    assert read_header(tmp_path / "pyramid.tif").pages == 2
    second = decode_image((tmp_path / "pyramid.tif").read_bytes(), page=1)
    assert (second.shape, int(second.mean())) == ((6, 8, 3), 10)
