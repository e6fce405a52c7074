"""Data sets that tfds prepares once and keeps as array_record, without TensorFlow.

A builder lists `Record`s per split; the functions here are the rest of it: what a prepared
example holds (`dataset_info`, `examples`), preparing (`prepare`) and reading (`source`).
"""

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from tqdm import tqdm

from fastflow_jax.data.dataset import GOOD, Source, check_choice
from fastflow_jax.data.transforms import check_image, decode_image
from fastflow_jax.errors import InputError


class Record(NamedTuple):
    """One image to prepare; its file is copied byte for byte."""

    image: Path
    defect: str
    name: str  # unique in its split


class Raw(NamedTuple):
    """Where the raw files of a data set lie."""

    folder: Path
    source: str  # what provenance says of it


def dataset_info(
    builder: tfds.core.DatasetBuilder, *, description: str, homepage: str, citation: str
) -> tfds.core.DatasetInfo:
    """What every prepared data set holds, in the order in which it was generated."""
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        homepage=homepage,
        citation=citation,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["good", "anomalous"]),
                "defect": tfds.features.Text(),
                "name": tfds.features.Text(),
            }
        ),
        supervised_keys=("image", "label"),
        disable_shuffling=True,
        metadata=tfds.core.MetadataDict(),
    )


def examples(records: Sequence[Record], title: str) -> Iterator[tuple[int, dict]]:
    """The examples that tfds writes; each image is seen to be whole."""
    for key, record in enumerate(tqdm(records, desc=f"preparing {title}", unit="image", delay=1)):
        try:
            image = record.image.read_bytes()
        except OSError as error:
            raise InputError(f"{record.image} cannot be read: {error.strerror}.") from error
        check_image(image, str(record.image))
        yield (
            key,
            {
                "image": image,
                "label": int(record.defect != GOOD),
                "defect": record.defect,
                "name": record.name,
            },
        )


def prepare(
    builder_class: type[tfds.core.GeneratorBasedBuilder],
    config: ConfigDict,
    find_raw: Callable[[str | None], Raw],
) -> tfds.core.DatasetBuilder:
    """The builder of `config.category`, its data set prepared now if it is not yet.

    tfds writes into a folder of another name and renames it when all is written, so that an
    interrupted preparation is never taken for a whole one.

    Args:
        builder_class: has one builder config a category.
        config: `config.data`.
        find_raw: from `config.root` to the raw files; called only if they are needed.

    Raises:
        InputError: no such category, no raw data, a broken image, or no place to write.
    """
    check_choice("data.category", config.category, builder_class.builder_configs)
    data_dir = config.dir or os.environ.get("TFDS_DATA_DIR")  # None: tfds's default

    def make_builder():
        return builder_class(
            data_dir=data_dir and os.path.expanduser(data_dir),
            config=config.category,
            file_format="array_record",
        )

    builder = make_builder()
    if builder.data_path.exists():
        _check_source(builder, config.root)
        return builder

    raw = find_raw(config.root)
    builder.info.metadata["source"] = raw.source
    download_config = tfds.download.DownloadConfig(manual_dir=raw.folder)
    try:
        # What tfds itself shows is of downloads, which there are none of.
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=download_config)
    except (OSError, RuntimeError) as error:  # array_record meets a full disk with the latter
        if not builder.data_path.exists():  # unless another process was faster
            raise InputError(
                f"{builder.info.full_name} cannot be written to {builder.data_dir} ({error}): "
                "make room there, or set data.dir to another place."
            ) from error
    finally:
        tfds.enable_progress_bar()
    for leftover in builder.data_path.parent.glob("incomplete.*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    return make_builder()


def _check_source(builder: tfds.core.DatasetBuilder, root: str | None) -> None:
    """Sees that a prepared data set is the one asked for, if one in particular is."""
    source = builder.info.metadata.get("source")
    if root is not None and source != str(Path(root).expanduser().resolve()):
        raise InputError(
            f"{builder.data_dir} was prepared from {source}, not from data.root {root}: "
            "leave data.root unset, remove that folder, or set data.dir to another place."
        )


def source(builder: tfds.core.DatasetBuilder, split: str) -> Source:
    """One split of a prepared data set.

    Raises:
        InputError: the prepared files are damaged.
    """
    title = builder.info.full_name
    try:
        data = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        texts = [(record["name"].decode(), record["defect"].decode()) for record in data]
    except Exception as error:  # array_record, protobuf and tfds each raise their own
        raise InputError(
            f"The prepared data set {builder.data_dir} is damaged ({error}): "
            "remove this folder and run again."
        ) from error
    names, defects = zip(*texts, strict=True)

    def load(index: int) -> tuple[np.ndarray, None]:
        return decode_image(data[index]["image"], f"{title}: {names[index]}"), None

    return Source(names, defects, load)


def provenance(builder: tfds.core.DatasetBuilder) -> dict:
    """Where a prepared data set came from, where it lies and how many images it has."""
    counts = {f"{name}_images": split.num_examples for name, split in builder.info.splits.items()}
    return {
        "source": builder.info.metadata["source"],
        "prepared": os.fspath(builder.data_dir),
        "category": builder.builder_config.name,
        **counts,
    }
