"""Reading of images while others are scored, by a detector that measures their brightness."""

import threading
import time
import weakref

import numpy as np
import pytest
from PIL import Image

from fastflow_jax.data.arrays import Given
from fastflow_jax.data.formats import Header
from fastflow_jax.decision import Decision
from fastflow_jax.prediction import Predictor


class Brightness(Predictor):
    """The score is the mean of the pixels."""

    image_size, resize, training_images, batch_size = (8, 8), "square", None, 8
    decision = Decision(None, None)

    def run(self, images, valid):
        """Scores model inputs, see `Predictor.run`."""
        maps = images.mean(-1, dtype=np.float32)
        return {"score": maps.mean((1, 2)), "anomaly_map": maps}


def test_most_of_the_next_batch_is_read_while_one_is_scored_and_its_pixels_are_freed():
    alive, all_read = [], threading.Event()

    def camera():
        for i in range(16):
            image = np.full((10, 12, 3), i, np.uint8)
            alive.append(weakref.ref(image))
            yield Given(f"image {i}", array=image, header=Header((10, 12)))
            if i == 12:  # of the next batch, 8 to 15
                all_read.set()
            del image

    class Waiting(Brightness):
        def run(self, images, valid):
            assert all_read.wait(20)  # fails if reading waits for this batch
            until = time.monotonic() + 20
            while sum(of() is not None for of in alive) > 1:  # the last one, by the iterator
                assert time.monotonic() < until
                time.sleep(0.01)
            return super().run(images, valid)

    scores = [result.score for result in Waiting().stream(camera())]
    assert scores == pytest.approx(range(16))


def test_pages_are_scored_in_order(tmp_path):
    images = [Image.new("L", (12, 10), level) for level in range(20)]
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:])
    Image.new("L", (12, 10), 20).save(tmp_path / "b.png")
    results = list(Brightness().stream(tmp_path))
    assert [result.score for result in results] == pytest.approx(range(21))
    assert results[-2].name == f"{tmp_path / 'a.tif'}#20"
