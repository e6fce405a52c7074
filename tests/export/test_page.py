"""The web page scores images as the exported model does, and loads nothing."""

import os
import tarfile

import chromium
import numpy as np
import pytest
from PIL import Image

from fastflow_jax import InputError
from fastflow_jax.exported import Exported

RUNTIME = os.environ.get("ONNXRUNTIME_WEB")  # a file of `npm pack`, or a directory


@pytest.fixture(scope="module")
def page(grey, tmp_path_factory):
    """The page of a detector, open in Chromium."""
    if not chromium.BINARY:
        pytest.skip("Chromium was not found")
    if not RUNTIME:
        pytest.skip("the variable ONNXRUNTIME_WEB does not name the npm package onnxruntime-web")
    folder = tmp_path_factory.mktemp("page")
    detector, _ = grey
    parity = detector.export(folder / "grey <&>.html", kind="html", runtime=RUNTIME)
    assert parity.flips == 0
    with chromium.page(folder / "profile") as page:
        page.size(800, 900)
        page.open(folder / "grey <&>.html")
        yield page


def scored(page, *files):
    """Chooses files in the page; returns the results that it shows for them."""
    known = page.run("document.querySelectorAll('#results li').length")
    page.run("queue.then(() => 0)")
    page.choose("#files", files)
    page.run("queue.then(() => 0)")
    found = page.run(
        "[...document.querySelectorAll('#results li')]"
        ".map(item => ({...item.dataset, text: item.innerText}))"
    )
    return found[known:]


@pytest.fixture(scope="module")
def images(grey, tmp_path_factory):
    """Image files: normal and spoilt, of several sizes, grey, turned, transparent."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    spoilt = Image.fromarray(grey[1])
    turned = Image.Exif()
    turned[0x0112] = 6
    made = {
        "normal": Image.fromarray(rng.integers(118, 138, (20, 30, 3), np.uint8)),
        "spoilt": spoilt,
        "large": spoilt.resize((90, 70), Image.Resampling.BICUBIC),
        "grey": spoilt.convert("L"),
        "transparent": spoilt.convert("RGBA"),
        "turned": spoilt.transpose(Image.Transpose.ROTATE_90),
    }
    made["transparent"].putpixel((3, 3), (255, 255, 255, 0))
    for name, image in made.items():
        image.save(folder / f"{name}.png", exif=turned if name == "turned" else b"")
    return [folder / f"{name}.png" for name in made]


def test_the_page_equals_the_exported_model(page, images, any_size):
    exported = Exported(any_size)
    for found, file in zip(scored(page, *images), images, strict=True):
        with Image.open(file) as image:
            pixels = np.asarray(Image.new("RGBA", image.size, "black"))
            pixels = Image.alpha_composite(Image.fromarray(pixels), image.convert("RGBA"))
            pixels = np.asarray(pixels.convert("RGB"))
        if file.stem == "turned":
            pixels = np.rot90(pixels, -1)
        expected = exported.run(np.ascontiguousarray(pixels)[None])
        assert float(found["score"]) == pytest.approx(expected["score"][0], rel=1e-4)
        assert float(found["pValue"]) == pytest.approx(expected["p_value"][0])
        assert found["isAnomalous"] == str(bool(expected["is_anomalous"][0])).lower()
        assert abs(int(found["maskPixels"]) - expected["mask"].sum()) <= 2
        decision = "anomalous" if expected["is_anomalous"][0] else "normal"
        assert found["text"].startswith(f"{file.name}: {decision}")
    assert expected["mask"].any()


def test_decisions_are_those_of_predictions(page, images, any_size):
    results = Exported(any_size).predict(images)
    found = [result["isAnomalous"] for result in scored(page, *images)]
    assert found == [str(result.is_anomalous).lower() for result in results]
    assert {"true", "false"} == set(found)


def test_the_map_is_drawn_where_the_image_is_spoilt(page, images):
    scored(page, images[1])
    levels = page.run("""(() => {
      const map = [...document.querySelectorAll(".map")].at(-1);
      const level = (x, y) => [...map.getContext("2d").getImageData(x, y, 1, 1).data];
      return [map.width, map.height, level(Math.floor(18.5 / 30 * map.width), map.height / 2 + 20),
              level(5, 5)];
    })()""")
    width, height, spoilt, normal = levels
    assert (width, height) == (640, 426)
    assert spoilt[3] > normal[3] + 50  # more opaque
    outlined = """[...document.querySelectorAll(".map")].at(-1).getContext("2d")
      .getImageData(0, 0, 640, 426).data.filter((v, i, all) => i % 4 == 1 && v == 255
      && all[i - 1] == 0 && all[i + 1] == 170).length"""
    assert page.run(outlined) > 100
    shown = "getComputedStyle([...document.querySelectorAll('.map')].at(-1)).visibility"
    assert page.run(shown) == "visible"
    page.run("document.getElementById('overlay').click()")
    assert page.run(shown) == "hidden"
    page.run("document.getElementById('overlay').click()")


def test_dropped_files_are_scored(page, images):
    known = page.run("document.querySelectorAll('#results li').length")
    data = list(images[1].read_bytes())
    page.run(f"""(() => {{
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array({data})], "dropped.png"));
      dispatchEvent(new DragEvent("drop", {{ dataTransfer: transfer, cancelable: true }}));
      return queue.then(() => 0);
    }})()""")
    text = page.run("[...document.querySelectorAll('#results li')].at(-1).innerText")
    assert page.run("document.querySelectorAll('#results li').length") == known + 1
    assert text.startswith("dropped.png: anomalous")


def test_a_file_that_is_no_image_is_named(page, images, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    broken, fine = scored(page, tmp_path / "notes.txt", images[0])
    assert "notes.txt\nThis file cannot be read. Convert it to PNG or JPEG." in broken["text"]
    assert fine["isAnomalous"] == "false"


def test_nothing_is_requested_and_nothing_fails(page, images):
    scored(page, images[0])
    assert {url.partition(":")[0] for url in page.requests} <= {"file", "blob", "data"}
    assert sum(url.startswith("file:") for url in page.requests) == 1  # the page itself
    assert not page.errors
    assert page.run("document.title") == "grey <&>"
    assert "licence of its weights: unknown" in page.run("document.body.innerText")


def test_a_missing_runtime_is_explained(grey, tmp_path):
    detector, _ = grey
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.tgz").write_bytes(b"no archive")
    with tarfile.open(tmp_path / "without.tgz", "w:gz") as archive:
        archive.add(tmp_path / "other.tgz", "package/dist/other.js")
    for runtime, reason in (
        (None, "needs ONNX Runtime Web"),
        ("nowhere", "is not the npm package"),
        ("empty", "is not the npm package"),
        ("other.tgz", "is not the npm package"),
        ("without.tgz", "is not the npm package"),
    ):
        path = runtime and tmp_path / runtime
        with pytest.raises(InputError, match=f"{reason}.*npm pack onnxruntime-web"):
            detector.export(tmp_path / "page.html", kind="html", runtime=path)
    assert not (tmp_path / "page.html").exists()


def test_a_runtime_is_for_pages(grey, tmp_path):
    with pytest.raises(InputError, match="A runtime is for the format html"):
        grey[0].export(tmp_path / "grey.onnx", runtime=tmp_path)
