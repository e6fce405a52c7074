"""Data sets that tfds prepares once and keeps as array_record, without TensorFlow.

A builder lists the files of its examples; the functions here are the rest of it: what a prepared
example holds (`dataset_info`, `examples`), preparing (`prepare`) and reading (`source`).
"""

import contextlib
import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from fastflow_jax.data.dataset import GOOD, Record, Source
from fastflow_jax.data.formats import Header, header_of, open_image, read_header
from fastflow_jax.data.transforms import check_image, decode_image, decode_mask, read_file
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded, is_utf8


class Raw(NamedTuple):
    """Where the raw files of a data set lie."""

    folder: Path
    source: str  # what provenance says of it


def dataset_info(
    builder: tfds.core.DatasetBuilder,
    *,
    masks: bool,
    description: str,
    homepage: str,
    citation: str,
) -> tfds.core.DatasetInfo:
    """What a prepared data set holds, in the order of its files."""
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["good", "anomalous"]),
        "defect": tfds.features.Text(),
        "name": tfds.features.Text(),
    }
    if masks:
        features["mask"] = tfds.features.Image(shape=(None, None, 1))
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        homepage=homepage,
        citation=citation,
        features=tfds.features.FeaturesDict(features),
        supervised_keys=("image", "label"),
        disable_shuffling=True,
        metadata=tfds.core.MetadataDict(),
    )


def examples(
    records: Sequence[Record], title: str, *, masks: bool
) -> Iterator[tuple[int, dict[str, object]]]:
    """What tfds writes: files byte for byte, each seen to be whole, blank masks where none is."""
    for key, record in enumerate(tqdm(records, desc=f"preparing {title}", unit="image", delay=1)):
        example = {
            "image": _read_whole(record.image),
            "label": int(record.defect != GOOD),
            # Bytes of file names that are not UTF-8 are escaped.
            "defect": record.defect.encode(errors="backslashreplace"),
            "name": record.name.encode(errors="backslashreplace"),
        }
        if masks:
            mask = record.mask
            example["mask"] = _read_whole(mask) if mask else _blank(read_header(record.image).size)
        yield key, example


def _read_whole(path: Path) -> bytes:
    data = read_file(path)
    check_image(data, str(path))
    return data


@functools.lru_cache(maxsize=16)
def _blank(size: tuple[int, int]) -> bytes:
    height, width = size
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def data_dir(config: ConfigDict) -> Path:
    """Where prepared data sets live: `config.dir`, else TFDS_DATA_DIR, else tfds's default."""
    folder = config.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return expanded(folder)


def prepare(
    builder_class: type[tfds.core.GeneratorBasedBuilder],
    builder_config: str | None,
    config: ConfigDict,
    find_raw: Callable[[ConfigDict], Raw],
) -> tfds.core.DatasetBuilder:
    """A builder whose data set is prepared, now if it was not yet.

    tfds writes into a folder of another name and renames it when all is written, so that an
    interrupted preparation is never taken for a whole one.

    Args:
        builder_class: makes the builder.
        builder_config: which of its configs, if it has any.
        config: `config.data`.
        find_raw: from `config.data` to the raw files; called only if they are needed.

    Raises:
        InputError: no raw data, a broken image, no place to write or one that is not UTF-8, or data
            of another root.
    """
    folder = data_dir(config)
    if not is_utf8(folder):
        raise InputError(
            f"{folder} is not UTF-8, as array_record needs it. Set data.dir to another directory."
        )

    def make_builder():
        try:
            return builder_class(data_dir=folder, config=builder_config)
        except Exception as error:  # protobuf, json and tfds each raise their own
            raise _damaged(folder / builder_class.name / (builder_config or ""), error) from error

    builder = make_builder()
    if builder.data_path.exists():
        _check_prepared(builder, config.root)
        return builder

    raw = find_raw(config)
    builder.info.metadata["source"] = raw.source
    try:
        # What tfds itself shows is of downloads, which there are none of.
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=raw.folder),
                file_format="array_record",
            )
    except (OSError, RuntimeError) as error:  # array_record meets a full disk with the latter
        if not builder.data_path.exists():  # unless another process was faster
            raise InputError(
                f"{builder.info.full_name} cannot be written to {builder.data_dir} ({error}): "
                "make room there, or set data.dir to another place."
            ) from error
    finally:
        tfds.enable_progress_bar()
    # Of runs that were killed. A path of etils would take brackets in itself for a pattern.
    for leftover in Path(builder.data_path).parent.glob("incomplete.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return make_builder()


def _check_prepared(builder: tfds.core.DatasetBuilder, root: str | None) -> None:
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise InputError(
            f"{builder.data_dir} is prepared as {file_format}, and only array_record is read "
            "without TensorFlow: set data.dir to another place to have it prepared there."
        )
    source = (builder.info.metadata or {}).get("source", "elsewhere")
    if root is not None and source != str(expanded(root).resolve()):
        raise InputError(
            f"{builder.data_dir} was prepared from {source}, not from data.root {root}: "
            "leave data.root unset, remove that folder, or set data.dir to another place."
        )


def _damaged(folder: os.PathLike | str, error: Exception) -> InputError:
    first_line = str(error).partition("\n")[0]
    return InputError(
        f"The prepared data set in {folder} is damaged ({first_line}): remove it and run again."
    )


def read(builder: tfds.core.DatasetBuilder, split: str) -> tuple[Sequence[dict], list[dict]]:
    """The examples of a split, read when asked for, and all but the images of each, read now.

    Images and masks are the bytes of their files.

    Raises:
        InputError: the prepared files are damaged.
    """
    images = [name for name in ("image", "mask") if name in builder.info.features]
    decoders = {name: tfds.decode.SkipDecoding() for name in images}
    try:
        data = builder.as_data_source(split, decoders=decoders)
        rest = [{k: v for k, v in example.items() if k not in images} for example in data]
    except Exception as error:  # array_record, protobuf and tfds each raise their own
        raise _damaged(builder.data_dir, error) from error
    return data, rest


def source(builder: tfds.core.DatasetBuilder, split: str) -> Source:
    """The source of one split; training images have no masks.

    Raises:
        InputError: the prepared files are damaged.
    """
    data, rest = read(builder, split)
    names = tuple(example["name"].decode() for example in rest)
    defects = tuple(example["defect"].decode() for example in rest)
    has_masks = split == "test" and "mask" in builder.info.features
    cut: set[str] = set()

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        example, name = data[index], f"{builder.info.full_name}: {names[index]}"
        image = decode_image(example["image"], name)
        if not has_masks:
            return image, None
        if defects[index] == GOOD:
            return image, np.zeros(image.shape[:2], bool)
        mask = decode_mask(example["mask"], f"the mask of {name}", on_cut=cut.add)
        return image, mask

    def header(index: int) -> Header:
        name = f"{builder.info.full_name}: {names[index]}"
        with open_image(io.BytesIO(data[index]["image"]), name) as image:
            return header_of(image, name)

    return Source(names, defects, load, header=header, cut_masks=cut)


def provenance(builder: tfds.core.DatasetBuilder) -> dict:
    """Where a prepared data set came from, where it lies and how many images it has."""
    counts = {f"{name}_images": split.num_examples for name, split in builder.info.splits.items()}
    source = (builder.info.metadata or {}).get("source", "elsewhere")
    return {"source": source, "prepared": os.fspath(builder.data_dir)} | counts
