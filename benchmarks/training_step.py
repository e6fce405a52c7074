"""Time of a training step compared with anomalib and with plain torch and FrEIA.

    pip install -e '.[bench]'
    python benchmarks/training_step.py --quick
    python benchmarks/training_step.py --out training_step.json
    python benchmarks/training_step.py --backbones resnet18 --dtypes float32 --batch 8

The published form (`configs/reference.py`) on all sides, with the same random weights and images,
checked to start with the same loss; Adam as in anomalib. "freia" is anomalib's model with FrEIA's
own blocks. bfloat16 applies to our convolutions and matrix products, and to torch's autocast. Two
forms of a step:

    backbone   the frozen backbone in every step, as anomalib runs, and ours with augmentation
    cached     features computed beforehand, as ours runs otherwise; on accelerators an epoch is one
               program

`as_run` is our cached step against anomalib's with the backbone. All sides take turns, each on all
cores. On a CPU the batch is 8 if a step of 32 needs too much memory or time, and in the quick form;
names state it. `time_to_quality.py` includes the time to compute features.

Each line `ratio <name> <number>` is the peer's median seconds per step over ours.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import same_weights
from outcome import describe_machine, ratios, versions, write_result
from peer import Peer

from fastflow_jax import parallel
from fastflow_jax.detectors.fastflow.scorer import objective
from fastflow_jax.features.extract import extractor
from fastflow_jax.training.step import TrainState, create_optimizer, train_epoch, train_step

BACKBONES = (
    "resnet18",
    "tf_efficientnet_lite0",
    "deit_base_distilled_patch16_384",
    "wide_resnet50_2",
)
LARGE = BACKBONES[2:]
PEERS = ("anomalib", "freia")
EPOCH = 8  # steps per program on accelerators


def our_steps(ours: same_weights.Ours) -> dict[str, Iterator[tuple[float, float]]]:
    """Iterators over (loss, seconds) of successive training steps, by form.

    Steps run as in `loop.train`: on an accelerator with cached features, an epoch is one program.
    """
    config, n = ours.config, len(ours.images)
    optimizer = create_optimizer(config.train, 1)
    loss = objective(config).loss
    step = partial(train_step, loss=loss, optimizer=optimizer, seed=0)
    how = (config.length_power, config.parallel, n, config.feature_dtype)
    extract = extractor(ours.backbone, *how)
    rows, weight = np.arange(n, dtype=np.int32), np.ones(n, np.float32)
    constants = dict(ours.variables)
    params = constants.pop("params")
    zero = jnp.zeros(())
    fresh = TrainState(
        jnp.zeros((), jnp.int32), params, constants, jax.jit(optimizer.init)(params), zero, zero
    )

    def steps(run, features, rows, weight, count):
        state = fresh
        while True:
            start = time.perf_counter()
            state = state.replace(epoch_loss=zero, epoch_images=zero)
            state = jax.block_until_ready(run(state, (features(), None), rows, weight))
            seconds = (time.perf_counter() - start) / count
            yield float(state.epoch_loss / state.epoch_images), seconds

    single = parallel.step(step, config.parallel)
    maps = extract(ours.images)
    forms = {"backbone": steps(single, lambda: extract(ours.images), rows, weight, 1)}
    if jax.default_backend() == "cpu":
        forms["cached"] = steps(single, lambda: maps, rows, weight, 1)
    else:
        whole = parallel.epoch(partial(train_epoch, step=step), config.parallel)
        maps = jax.tree.map(jnp.asarray, maps)
        many = (np.tile(rows, (EPOCH, 1)), np.tile(weight, (EPOCH, 1)))
        forms["cached"] = steps(whole, lambda: maps, *many, EPOCH)
    return forms


def compare(peer: Peer, backbone: str, batch: int, dtype: str, repeats: int) -> dict:
    """Median step times of all sides in both forms, measured in turns after warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        ours = same_weights.build(peer, backbone, batch, dtype, pathlib.Path(folder))

    def peer_step(model, cached):
        answer = peer.call("train_seconds", model=model, cached=cached, dtype=dtype)
        return answer["loss"], answer["seconds"]

    sides = {}
    for form, steps in our_steps(ours).items():
        sides[form, "ours"] = steps.__next__
        for model in PEERS:
            sides[form, model] = partial(peer_step, model, form == "cached")
    first = {name: side()[0] for name, side in sides.items()}
    loss = first["backbone", "ours"]
    for model in PEERS:
        theirs = first["backbone", model]
        if abs(loss - theirs) > (1e-3 if dtype == "float32" else 0.02) * abs(theirs):
            sys.exit(f"{backbone} {dtype}: our loss {loss} differs from that of {model}, {theirs}")
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side()[1])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "backbone": backbone,
        "batch": batch,
        "dtype": dtype,
        "loss": {side: first["backbone", side] for side in ("ours", *PEERS)},
        "images_per_second": {
            form: {side: batch / medians[form, side] for side in ("ours", *PEERS)}
            for form in ("backbone", "cached")
        },
    }


def main() -> None:
    """Compares all, prints a line each and the ratios, and writes the file if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a short form, under five minutes")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()

    on_cpu = jax.default_backend() == "cpu"
    quick_on_cpu = args.quick and on_cpu
    names = args.backbones or (BACKBONES[:2] if quick_on_cpu else BACKBONES)
    dtypes = args.dtypes or (["float32"] if quick_on_cpu else ["float32", "bfloat16"])
    repeats = 3 if args.quick else args.repeats
    rows = []
    with ratios() as found, Peer() as peer:
        for name in names:
            for dtype in dtypes:
                batch = args.batch or (8 if quick_on_cpu or (on_cpu and name in LARGE) else 32)
                row = compare(peer, name, batch, dtype, repeats)
                rows.append(row)
                start = f"{name}_{dtype}_batch{batch}"
                for form, speed in row["images_per_second"].items():
                    sides = ", ".join(f"{side} {value:.2f}" for side, value in speed.items())
                    print(f"{start} {form}: {sides} images a second", flush=True)
                    for model in PEERS:
                        found[f"{start}_{form}_{model}"] = speed["ours"] / speed[model]
                speed = row["images_per_second"]
                found[f"{start}_as_run_anomalib"] = (
                    speed["cached"]["ours"] / speed["backbone"]["anomalib"]
                )
    result = {
        "question": __doc__.partition("\n")[0],
        "machine": describe_machine(None if on_cpu else jax.devices()[0].device_kind),
        "versions": versions("jax"),
        "rows": rows,
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
