"""Heat maps: panels, colours, outlines, colour bar and files."""

import numpy as np
import pytest
from PIL import Image

from fastflow_jax.errors import InputError
from fastflow_jax.report.heatmaps import draw_heatmap, draw_strip, save_picture, stack_pictures

OUTLINE = (0, 255, 170)


def noise_image(height=260, width=300, seed=0):
    """Returns an RGB image of noise between 40 and 215."""
    rng = np.random.default_rng(seed)
    return rng.integers(40, 216, (height, width, 3), dtype=np.uint8)


def panels(picture, image):
    """Returns the panels of an untitled picture, [H, W, 3] each; its image was not resized."""
    height, width = image.shape[:2]
    pixels = np.asarray(picture)[12 : 12 + height]
    starts = range(12, pixels.shape[1] - width, width + 10)
    return [pixels[:, x : x + width] for x in starts]


def test_the_image_is_unchanged_and_a_map_of_low_values_is_grey():
    image = noise_image()
    shown, coloured = panels(draw_heatmap(image, np.zeros((8, 8)), low=0, high=1), image)
    np.testing.assert_array_equal(shown, image)
    np.testing.assert_array_equal(
        coloured, np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
    )


def test_colours_are_at_the_high_values_of_the_map_on_an_oblong_image():
    image = np.full((260, 400, 3), 90, np.uint8)
    anomaly_map = np.zeros((16, 16), np.float32)
    anomaly_map[12, 3] = 5
    _, coloured = panels(draw_heatmap(image, anomaly_map, low=0, high=5), image)
    hot = np.argwhere(coloured.sum(-1) == coloured.sum(-1).max()).mean(0)
    np.testing.assert_allclose(hot, [12.5 * 260 / 16, 3.5 * 400 / 16], atol=2)
    assert (coloured[:100, 200:] == 90).all()


def test_higher_values_are_lighter_and_values_out_of_range_are_clipped():
    image = np.zeros((256, 300, 3), np.uint8)
    ramp = np.broadcast_to(np.linspace(-1, 2, 300, dtype=np.float32), (256, 300))
    _, coloured = panels(draw_heatmap(image, ramp, low=0, high=1), image)
    lightness = np.asarray(Image.fromarray(coloured).convert("L"))[0].astype(int)
    inside = lightness[105:195]
    assert (np.diff(inside) >= 0).all()
    assert inside[-1] > inside[0] + 150
    assert (lightness[:98] == lightness[0]).all()
    assert (lightness[202:] == lightness[-1]).all()


def test_the_outline_surrounds_the_defect_without_covering_it():
    image = noise_image()
    mask = np.zeros(image.shape[:2], bool)
    mask[100:140, 200:260] = True
    picture = draw_heatmap(image, np.zeros((4, 4)), low=0, high=1, mask=mask)
    _, _, outlined = panels(picture, image)
    green = (outlined == OUTLINE).all(-1)
    np.testing.assert_array_equal(outlined[mask], image[mask])
    assert green[99, 200:260].all()
    assert green[100:140, 260].all()
    assert not green[:90].any()
    changed = (outlined != image).any(-1)
    assert not changed[:96].any()
    assert not changed[:, :196].any()


def test_one_defective_pixel_of_a_large_image_is_outlined():
    image = noise_image(1500, 2000)
    mask = np.zeros(image.shape[:2], bool)
    mask[701, 1203] = True
    picture = draw_heatmap(image, np.zeros((4, 4)), low=0, high=1, mask=mask)
    assert picture.width < 3 * 512 + 150
    assert (np.asarray(picture) == OUTLINE).all(-1).any()


def test_a_defect_of_the_whole_image_is_framed_and_a_good_image_is_not():
    image = noise_image()
    for defective in (True, False):
        mask = np.full(image.shape[:2], defective)
        picture = draw_heatmap(image, np.zeros((4, 4)), low=0, high=1, mask=mask)
        _, _, outlined = panels(picture, image)
        green = (outlined == OUTLINE).all(-1)
        assert green[0].all() == green[:, -1].all() == defective
        assert not green[5:-5, 5:-5].any()
    assert len(panels(draw_heatmap(image, np.zeros((4, 4)), low=0, high=1), image)) == 2


@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (20, 900), (900, 20), (3000, 100)])
def test_all_image_sizes_and_constant_maps_are_drawn(shape):
    image = noise_image(*shape)
    picture = draw_heatmap(
        image, np.full((3, 5), 7.0), low=7, high=7, mask=np.ones(shape, bool), title="x" * 200
    )
    assert picture.height <= 512 + 80
    assert picture.width >= 200 * 5  # the title fits


def test_invalid_ranges_and_nan_raise_an_error():
    image = noise_image()
    for low, high in ((1, 0), (0, np.inf), (np.nan, 1)):
        with pytest.raises(InputError, match="two finite numbers"):
            draw_heatmap(image, np.zeros((4, 4)), low=low, high=high)
    with pytest.raises(InputError, match=r"crack/1\.png contains NaN"):
        draw_heatmap(image, np.full((4, 4), np.nan), low=0, high=1, title="crack/1.png")


def test_saving_replaces_the_whole_file_or_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "heatmaps" / "a.png"
    picture = Image.new("RGB", (20, 10), (1, 2, 3))
    save_picture(path, picture)
    before = path.read_bytes()
    with Image.open(path) as read:
        np.testing.assert_array_equal(np.asarray(read), np.asarray(picture))

    def fill_the_disk(file, **_):
        file.write(before[:30])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_picture(path, picture)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_pictures_of_several_sizes_stack_in_rows():
    sizes = [(30, 10), (20, 25), (50, 5)]
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pictures = [Image.new("RGB", size, c) for size, c in zip(sizes, colours, strict=True)]
    sheet = stack_pictures(pictures, columns=2)
    assert sheet.size == (50, 30)
    assert [sheet.getpixel(at) for at in [(0, 0), (30, 24), (49, 29)]] == colours


def test_a_strip_has_image_map_predicted_mask_and_ground_truth():
    image = np.full((200, 400, 3), 90, np.uint8)
    anomaly_map = np.zeros((8, 16), np.float32)
    anomaly_map[4:, 8:] = 5
    mask = np.zeros((200, 400), bool)
    mask[:, :100] = True
    strip = draw_strip(image, anomaly_map, low=0, high=5, threshold=2.5, mask=mask)
    assert strip.size == (4 * 160, 80)
    shown, coloured, predicted, truth = np.split(np.asarray(strip).astype(int), 4, axis=1)
    assert (shown == 90).all()
    assert coloured[60, 120].sum() > coloured[20, 40].sum() == 3 * 90
    lower_right, rest = predicted[46:, 86:], (predicted[:34], predicted[:, :74])
    assert len(np.unique(lower_right.reshape(-1, 3), axis=0)) == 1
    assert all((part == predicted[0, 0]).all() for part in rest)
    assert (lower_right[0, 0] != predicted[0, 0]).any()
    assert (truth[:, :40] == OUTLINE).all()
    assert not (truth[:, 40:] == OUTLINE).all(-1).any()
    without = draw_strip(image, anomaly_map, low=0, high=5, threshold=2.5)
    assert without.size == (3 * 160, 80)
    nothing = draw_strip(image, np.full((4, 4), 2.5), low=0, high=5, threshold=2.5)
    assert (np.asarray(nothing)[:, 320:] == predicted[0, 0]).all()  # a value at the threshold


def test_pixels_above_the_threshold_are_outlined_and_the_colour_bar_marks_it():
    image = noise_image(256, 256)
    anomaly_map = np.zeros((256, 256), np.float32)
    anomaly_map[100:150, 60:120] = 3
    picture = draw_heatmap(image, anomaly_map, low=0, high=4, threshold=1.0)
    shown, coloured = panels(picture, image)[:2]
    np.testing.assert_array_equal(shown, image)
    rows, columns = np.nonzero((coloured == OUTLINE).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (98, 151, 58, 121)
    assert not (coloured[104:146, 64:116] == OUTLINE).all(-1).any()
    bar = np.asarray(picture)[12 : 12 + 256, 12 + 2 * 266 :]
    (marked,) = np.nonzero((bar == OUTLINE).all(-1).any(1))
    assert marked.mean() == pytest.approx(255 * (1 - 1 / 4), abs=1)
    plain = np.asarray(draw_heatmap(image, anomaly_map, low=0, high=4))
    assert not (plain == OUTLINE).all(-1).any()


@pytest.mark.parametrize("threshold", [-5.0, 99.0])
def test_a_threshold_out_of_range_is_marked_at_the_end_of_the_colour_bar(threshold):
    image = noise_image(256, 256)
    picture = draw_heatmap(image, np.zeros((8, 8)), low=0, high=4, threshold=threshold)
    bar = np.asarray(picture)[12 : 12 + 256, 12 + 2 * 266 :]
    (marked,) = np.nonzero((bar == OUTLINE).all(-1).any(1))
    assert abs(marked.mean() - (0 if threshold > 4 else 255)) < 4


def test_the_region_of_interest_is_outlined_in_the_image_alone():
    image, region = noise_image(), np.zeros((260, 300), bool)
    region[40:200, 60:240] = True
    how = {"low": 0.0, "high": 1.0, "title": "x"}
    for draw, scale in (
        (draw_heatmap, how),
        (draw_strip, {"low": 0.0, "high": 1.0, "threshold": 0.5}),
    ):
        found = np.asarray(draw(image, np.zeros((8, 8)), region=region, **scale))
        blue = (found == (90, 170, 255)).all(-1)
        rows, columns = np.nonzero(blue)
        assert len(rows) > 200
        assert columns.max() < found.shape[1] / 2
        assert (
            not (np.asarray(draw(image, np.zeros((8, 8)), **scale)) == (90, 170, 255)).all(-1).any()
        )
        height = np.ptp(rows) / np.ptp(columns)
        assert height == pytest.approx(160 / 180, abs=0.05)
