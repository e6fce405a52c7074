"""Targets: manifests, lists of images, groups, polygons, and JSON of runs."""

import functools
import json
import pathlib
from random import Random

import numpy as np
from PIL import Image

from fastflow_jax.config import default, from_plain
from fastflow_jax.data import manifest, polygons
from fastflow_jax.data.dataset import Dataset, Source
from fastflow_jax.data.exclude import without_excluded
from fastflow_jax.data.groups import labels_of
from fastflow_jax.files import parse_json, read_lines, to_plain
from fastflow_jax.runs.products import read_products
from hostile import mutation
from hostile.detectors import batch
from hostile.target import Target

_SIZE = (5, 6)


def _images() -> None:
    for name in ("a.png", "b.png", "mask.png"):
        Image.new("L", _SIZE[::-1], 255).save(name)


def _manifest_csv() -> list[bytes]:
    rows = ["path,split,label,mask", "a.png,train,good,", "b.png,test,crack,mask.png"]
    return [
        "\n".join(rows).encode(),
        "\r\n".join(['"' + r.replace(",", '","') + '"' for r in rows]).encode(),
    ]


def _manifest_json() -> list[bytes]:
    rows = [
        {"path": "a.png", "split": "train", "label": "good"},
        {"path": "b.png", "split": "test", "label": "crack", "mask": ["mask.png"]},
    ]
    return [json.dumps(rows).encode()]


def _read_manifest(suffix: str, data: bytes) -> None:
    _images()
    path = pathlib.Path(f"list{suffix}").absolute()
    path.write_bytes(data)
    manifest.read(path, None)


def _count(path: str) -> list[str]:
    """Command that counts the images of a manifest."""
    _images()
    return ["data", "--config=folder", f"--config.data.manifest={path}"]


def _labelme() -> list[bytes]:
    points = [[0, 0], [5, 1], [3, 4]]
    shapes = [{"label": "x", "points": points, "shape_type": "polygon"}]
    shapes.append({"label": "y", "points": points[:2], "shape_type": "rectangle"})
    content = {"imagePath": "a.png", "imageHeight": 5, "imageWidth": 6, "shapes": shapes}
    return [json.dumps(content).encode()]


def _coco() -> list[bytes]:
    images = [{"id": 1, "file_name": "a.png", "height": 5, "width": 6}]
    annotations = [
        {"image_id": 1, "segmentation": [[0, 0, 5, 1, 3, 4]]},
        {"image_id": 1, "segmentation": {"counts": [10, 5, 15], "size": [5, 6]}},
    ]
    return [json.dumps({"images": images, "annotations": annotations}).encode()]


def _read_polygons(data: bytes) -> None:
    image, path = pathlib.Path("a.png"), pathlib.Path("case.json")
    path.write_bytes(data)
    polygons._read.cache_clear()  # files of other cases have the same name and, perhaps, time
    mask = polygons.draw(path, image, _SIZE)
    assert mask.shape == _SIZE
    assert mask.dtype == bool
    if b"annotations" in data:
        polygons.annotated(path, [image])


def _dataset() -> Dataset:
    names = ("good/a.png", "good/b.png", "part_1/c.png")
    source = Source(names, ("good",) * 3, lambda index: (np.zeros((2, 2, 3), np.uint8), None))
    return Dataset("images", source, None, {})


def _read_lists(data: bytes) -> None:
    """Reads a file as a list to leave out, and as a table of groups."""
    path = pathlib.Path("case.csv")
    path.write_bytes(data)
    if data.startswith(b"path,group"):
        labels_of(_dataset().train.names, str(path))
    else:
        without_excluded(_dataset(), str(path))


def _batch(suffix: str) -> list[bytes]:
    if suffix == ".parquet":
        return _parquet()
    texts = {
        ".txt": "a.png\nb.png\n",
        ".csv": "path,label\na.png,1\nb.png,2\n",
        ".jsonl": '{"path": "a.png"}\n{"path": "b.png", "more": [1]}\n',
    }
    return [texts[suffix].encode()]


def _parquet() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = []
    for column in (pa.array(["a.png", "b.png"]), pa.array([b"\x89PNG", b""])):
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({"path": column}), buffer)
        found.append(buffer.getvalue().to_pybytes())
    return found


def _read_batch(suffix: str, data: bytes) -> None:
    from fastflow_jax.batch.items import Shard, find_items

    path = pathlib.Path(f"case{suffix}")
    path.write_bytes(data)
    for item in find_items(str(path), "path", Shard(1, 1)).values():
        item.size_and_time()
        item.given()


def _records() -> list[bytes]:
    config = to_plain(from_plain(to_plain(_filled())))
    return [
        mutation.to_json({"kind": "config", "content": config}),
        mutation.to_json(
            {"kind": "products", "content": {"format": 1, "products": {"a": "x", "b": "y"}}}
        ),
        mutation.to_json({"kind": "lines", "content": {"epoch": 1, "loss": 0.5}}),
    ]


def _filled():
    from fastflow_jax.config import fill

    config = default()
    config.data.name, config.weights = "synthetic", "random"
    return fill(config)


def _of_record(data: bytes, rng: Random, others=()) -> bytes:
    """Changes the content of a record; its kind stays."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return mutation.of_bytes(data, rng, others)
    changed = mutation.of_value(record["content"], rng)
    return mutation.to_json(record | {"content": changed})


def _read_record(data: bytes) -> None:
    """Reads JSON as each file of a run that has this form."""
    kind = data[10:16]
    content = data.partition(b'"content": ')[2].removesuffix(b"}")
    folder = pathlib.Path.cwd()
    if kind.startswith(b"conf"):
        (folder / "config.json").write_bytes(content)
        plain = parse_json(folder / "config.json")
        if isinstance(plain, dict):  # as `durable` and `saved` check
            from_plain(plain)
    elif kind.startswith(b"prod"):
        (folder / "products.json").write_bytes(content)
        read_products(folder)
    else:
        (folder / "metrics.jsonl").write_bytes(content)
        assert all(isinstance(line, dict) for line in read_lines(folder / "metrics.jsonl"))


_POLYGONS = ("fastflow_jax.data.polygons",)
TARGETS = (
    Target("manifest_csv", _manifest_csv, mutation.of_text,
           functools.partial(_read_manifest, ".csv"), ("fastflow_jax.data.manifest",),
           command=_count, suffix=".csv"),
    Target("manifest_json", _manifest_json, mutation.of_json,
           functools.partial(_read_manifest, ".json"), ("fastflow_jax.data.manifest",),
           command=_count, suffix=".json"),
    Target("polygons", lambda: _labelme() + _coco(), mutation.of_json,
           _read_polygons, _POLYGONS),
    Target("lists",
           lambda: [b"# names\ngood/a.png\n", b"path,group\na.png,1\nb.png,2\nc.png,2\n"],
           mutation.of_text, _read_lists,
           ("fastflow_jax.data.exclude", "fastflow_jax.data.groups")),
    *(Target(f"batch{suffix.replace('.', '_')}", functools.partial(_batch, suffix),
             mutation.of_bytes if suffix == ".parquet" else mutation.of_text,
             functools.partial(_read_batch, suffix), ("fastflow_jax.batch.items",),
             command=batch, suffix=suffix)
      for suffix in (".txt", ".csv", ".jsonl", ".parquet")),
    Target("records", _records, _of_record, _read_record,
           ("fastflow_jax.config", "fastflow_jax.runs.products", "fastflow_jax.files")),
)  # fmt: skip
