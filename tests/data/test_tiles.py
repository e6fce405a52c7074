"""Tiles of the images of a source, and whole images from the results of tiles."""

import threading

import numpy as np
import pytest

from fastflow_jax.data.dataset import Regions, Source
from fastflow_jax.data.formats import Header
from fastflow_jax.data.tiles import Tiles, image_means_of, resized
from fastflow_jax.data.tiling import Places, Tiling, places
from fastflow_jax.errors import InputError

SIZES = [(40, 70), (24, 24), (90, 30)]
TILE = (24, 32)


def image_of(size, seed):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def source_of(sizes=SIZES, *, masks=False, header=True, loaded=None):
    images = [image_of(size, i) for i, size in enumerate(sizes)]

    def load(index):
        if loaded is not None:
            loaded.append(index)
        return images[index], images[index][..., 0] > 200 if masks else None

    return Source(
        names=tuple(f"{i}.png" for i in range(len(sizes))),
        defects=tuple("good" if i % 2 else "scratch" for i in range(len(sizes))),
        load=load,
        header=(lambda index: Header(sizes[index])) if header else None,
        groups=tuple("ab"[i % 2] for i in range(len(sizes))),
    )


def tiles_of(source, **fields):
    return Tiles.of(source, Tiling(TILE), TILE, "square", **fields)


def test_tiles_are_the_parts_of_the_images():
    source = source_of(masks=True)
    tiles = tiles_of(source)
    for i, size in enumerate(SIZES):
        assert list(tiles.places[i]) == places(size, TILE)
        for row, place in zip(tiles.rows([i]), tiles.places[i], strict=True):
            example = tiles.source[int(row)]
            np.testing.assert_array_equal(example.image, source[i].image[place])
            assert example.mask is None
            assert (example.defect, tiles.source.groups[row]) == (source.defects[i], "ab"[i % 2])
    assert len(set(tiles.source.names)) == len(tiles.image) > len(SIZES)


def test_sizes_come_from_headers_or_from_the_images():
    loaded = []
    with_headers = tiles_of(source_of(loaded=loaded))
    assert loaded == []
    assert with_headers.sizes == tiles_of(source_of(header=False)).sizes == tuple(SIZES)
    assert with_headers.canvas == (90, 70)


def test_an_image_is_decoded_once_for_all_of_its_tiles():
    loaded = []
    tiles = tiles_of(source_of([(96, 128)] * 3, loaded=loaded))
    threads = [
        threading.Thread(target=tiles.source.load, args=(int(row),)) for row in tiles.rows([1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(threads) > 9
    assert loaded == [1]


def test_an_image_that_has_changed_its_size_is_an_error():
    source = source_of([(40, 70)])
    tiles = tiles_of(source)
    other = Tiles(source_of([(40, 69)]), tiles.sizes, tiles.places, TILE, "square")
    with pytest.raises(InputError, match=r"0\.png has 69 x 40 pixels, but 70 x 40"):
        other.source[0]


def test_whole_images_have_the_highest_score_and_a_map_without_seams():
    tiles = tiles_of(source_of())
    rng = np.random.default_rng(0)
    scores = rng.normal(size=len(tiles.image)).astype(np.float32)
    fields = [np.float32(np.add.outer(np.arange(h), 2 * np.arange(w))) for h, w in SIZES]

    def scored(rows):
        for batch in np.array_split(rows, 4):
            yield scores[batch], np.stack([_input_map(fields, tiles, row) for row in batch])

    rows = tiles.rows([2, 0])
    first, second = tiles.whole(rows, scored(rows))
    assert (first.index, second.index) == (2, 0)
    for whole in (first, second):
        assert whole.score == scores[tiles.image == whole.index].max()
        assert whole.anomaly_map.shape == SIZES[whole.index]
        # Tiles are not resized if the image is larger than a tile.
        np.testing.assert_allclose(whole.anomaly_map, fields[whole.index], atol=2)


def _input_map(fields, tiles, row):
    """The part of a field that a tile shows, resized to the input by the nearest pixel."""
    image = tiles.image[row]
    place = tiles.places[image][row - tiles.rows([image])[0]]
    part = fields[image][place]
    rows, columns = (np.arange(n) * m // n for n, m in zip(TILE, part.shape, strict=True))
    return part[np.ix_(rows, columns)]


def test_a_score_that_is_not_a_number_stays():
    tiles = tiles_of(source_of([(40, 70)]))
    n = len(tiles.image)
    scores, maps = np.zeros(n, np.float32), np.zeros((n, *TILE), np.float32)
    scores[1] = np.nan
    (whole,) = tiles.whole(np.arange(n), [(scores, maps)])
    assert np.isnan(whole.score)


def test_means_are_those_of_the_tiles_of_each_image():
    vectors = np.array([[1.0, 2], [3, 4], [10, 20]])
    found = image_means_of(vectors, np.array([0, 0, 5]))
    np.testing.assert_array_equal(found, [[2, 3], [10, 20]])


def test_arrays_are_padded_to_the_largest_image():
    tiles = tiles_of(source_of())
    padded = tiles.on_canvas(1, np.ones((2, 24, 24), bool))
    assert padded.shape == (2, 90, 70)
    assert padded.sum() == 2 * 24 * 24
    assert padded[:, :24, :24].all()


def test_resized_images_masks_and_regions_keep_the_aspect_ratio():
    whole = source_of([(40, 80)], masks=True)

    def regions(index):
        mask = np.zeros((2, 40, 80), bool)
        mask[0, :20, :40] = mask[1, 39, 79] = True
        return Regions(mask, np.array([1.0, 0.5], np.float32))

    source = Source(whole.names, whole.defects, whole.load, header=whole.header, regions=regions)
    half = resized(source, 40, "nearest")
    example = half[0]
    assert example.image.shape == (20, 40, 3)
    assert example.mask.shape == (20, 40)
    found = half.regions(0)
    assert found.masks[0].sum() == 10 * 20
    assert resized(source, None, "nearest") is source


def test_statistics_of_places_standardise_normal_tiles():
    where = places((40, 70), TILE)
    rng, n = np.random.default_rng(0), 4000
    level, spread = rng.normal(size=len(where)) * 5, rng.uniform(0.5, 2, len(where))
    scores = level + spread * rng.normal(size=(n, len(where)))
    maps = 3 * level + 2 * spread * rng.normal(size=(n, 6, len(where)))
    moments = np.stack([maps.mean(1), np.square(maps).mean(1)], -1)
    found = Places.fit(where, scores, moments)
    for i, place in enumerate(where):
        score, anomaly_map = found.standardise(place, scores[:, i], maps[..., i])
        assert (score.mean(), score.std()) == pytest.approx((0, 1), abs=0.02)
        assert (anomaly_map.mean(), anomaly_map.std()) == pytest.approx((0, 1), abs=0.02)
    assert found.fits(where)
    assert not found.fits(places((40, 71), TILE))


def test_few_images_do_not_give_a_place_a_low_deviation_by_chance():
    where = places((40, 70), TILE)
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(4, len(where)))
    scores[:, 0] = 0.5  # four equal scores
    found = Places.fit(where, scores, np.ones((4, len(where), 2)))
    score, _ = found.standardise(where[0], np.float32(1.5), np.zeros(TILE, np.float32))
    assert abs(score) < 3
