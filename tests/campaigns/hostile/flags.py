"""Target: flags of the command line."""

import json
import pathlib
from collections.abc import Sequence
from random import Random

from PIL import Image

from hostile import command, mutation
from hostile.detectors import exported
from hostile.target import Target

_TINY = ["--config.image_size=32", "--config.backbone=resnet18", "--config.weights=random"]
_TINY += ["--config.layers=('layer1',)", "--config.flow.steps=1", "--config.flow.kernels=(1,)"]


def _seeds() -> list[bytes]:
    batch = ["batch", "--model=tiny.onnx", "--input=a.png", "--output=out", "--shard=1/1"]
    batch += ["--column=path", "--false_alarm_rate=0.5", "--raw=npy", "--notile", "--threads=1"]
    describe = [
        "describe",
        "--config=folder",
        *_TINY,
        "--config.detector=knn",
    ]  # refused at the end
    describe += [
        "--config.map.bank=10",
        "--config.train.batch_size=2",
        "--config.data.holdout=0.2",
        "--config.seed=0",
    ]
    data = [
        "data",
        "--config=folder",
        "--config.data.root=images",
        "--config.data.exclude=list.txt",
    ]
    return [json.dumps(words).encode() for words in (batch, describe, data)]


def _change(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Changes the value or the name of a flag, but neither the command nor the configuration."""
    words = json.loads(data)
    i = rng.randrange(1, len(words))
    name, _, value = words[i].partition("=")
    if name in ("--config", "--model"):
        return data
    match rng.randrange(6):
        case 0:
            del words[i]
        case 1:
            words.append(words[i])
        case 2:
            name = name[: rng.randrange(2, len(name) + 1)]
            words[i] = f"{name}={value}"
        case 3:
            words[i] = name
        case 4:
            new = rng.choice((*mutation.TEXTS, *map(str, mutation.VALUES)))
            words[i] = f"{name}={new}"
        case _:
            new = mutation.of_text(value.encode("utf-8", "replace"), rng)
            words[i] = f"{name}={new.decode('utf-8', 'replace')}"
    if not any(word.startswith("--config=") for word in words) and words[0] != "batch":
        return data
    return json.dumps(words).encode()


def _read(data: bytes) -> None:
    pathlib.Path("images/train/good").mkdir(parents=True)
    for name in ("a.png", "images/train/good/a.png", "images/train/good/b.png"):
        Image.new("RGB", (8, 8), (len(name), 9, 9)).save(name)
    pathlib.Path("list.txt").write_text("b.png\n")
    pathlib.Path("tiny.onnx").write_bytes(exported()[0])
    # An argument of a process has no NUL.
    command.run([word.replace("\0", "") for word in json.loads(data)])


TARGETS = (
    Target(
        "flags",
        _seeds,
        _change,
        _read,
        ("fastflow_jax.main", "fastflow_jax.cli.commands", "fastflow_jax.config"),
        cases=5,
    ),
)
