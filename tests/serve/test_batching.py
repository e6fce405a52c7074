"""Dynamic batching: sizes, latency, errors, the end of the queue."""

import threading
import time

import pytest

from fastflow_jax.serve.batching import Batcher


class Doubler:
    """Doubles numbers; waits for `may_run` first, and fails on a batch with None."""

    def __init__(self):
        self.batches, self.idled, self.begun = [], threading.Event(), threading.Event()
        self.may_run = threading.Event()
        self.may_run.set()

    def run(self, payloads):
        self.begun.set()
        self.may_run.wait(10)
        self.batches.append(list(payloads))
        return [2 * payload for payload in payloads]

    def idle(self):
        self.idled.set()


def test_what_waits_is_computed_in_batches_of_at_most_the_size():
    runner = Doubler()
    runner.may_run.clear()
    sizes = []
    batcher = Batcher([runner], size=4, latency=0, on_batch=sizes.append)
    results = [batcher.submit(0)]
    assert runner.begun.wait(10)
    results += [batcher.submit(i) for i in range(1, 10)]
    assert batcher.waiting == 9
    runner.may_run.set()
    assert [result.result(10) for result in results] == [2 * i for i in range(10)]
    batcher.close()
    assert runner.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]
    assert sizes == [1, 4, 4, 1]


def test_a_payload_waits_for_others_no_longer_than_the_latency():
    runner = Doubler()
    batcher = Batcher([runner], size=2, latency=0.2)
    start = time.monotonic()
    assert batcher.submit(1).result(10) == 2
    assert 0.19 < time.monotonic() - start < 2
    start = time.monotonic()
    pair = [batcher.submit(2), batcher.submit(3)]
    assert [result.result(10) for result in pair] == [4, 6]
    assert time.monotonic() - start < 0.19  # the batch is full
    batcher.close()
    assert runner.batches == [[1], [2, 3]]


def test_an_error_reaches_only_the_payloads_of_its_batch():
    batcher = Batcher([Doubler()], size=1, latency=0)
    failing, good = batcher.submit(None), batcher.submit(4)
    with pytest.raises(TypeError):
        failing.result(10)
    assert good.result(10) == 8
    batcher.close()


def test_what_is_queued_is_computed_before_the_end():
    runners = [Doubler(), Doubler()]
    batcher = Batcher(runners, size=3, latency=5)
    results = [batcher.submit(i) for i in range(20)]
    batcher.close()
    assert [result.result(0) for result in results] == [2 * i for i in range(20)]
    assert sorted(n for runner in runners for batch in runner.batches for n in batch) == [
        *range(20)
    ]


def test_runners_are_told_that_there_is_nothing_to_do():
    runner = Doubler()
    batcher = Batcher([runner], size=1, latency=0)
    assert runner.idled.wait(10)
    batcher.close()
