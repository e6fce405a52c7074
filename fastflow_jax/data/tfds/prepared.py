"""Data sets that tfds prepares once and stores as array_record, without TensorFlow.

`Builder` is the base class of sets with categories; `open_category` prepares and opens one.
`prepare` and `read` serve other builders too.
"""

import contextlib
import functools
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from fastflow_jax.data.dataset import (
    GOOD,
    DataConfig,
    Dataset,
    Record,
    Source,
    check_choice,
    check_counts,
)
from fastflow_jax.data.formats import Header, header_of, open_image, read_header
from fastflow_jax.data.layout import Splits, read_layout
from fastflow_jax.data.transforms import check_image, decode_image, decode_mask, read_file
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded, is_utf8


class Raw(NamedTuple):
    """Raw files of a data set."""

    folder: Path
    source: str  # recorded in the provenance


def builder_configs(categories: Iterable[str]) -> list[tfds.core.BuilderConfig]:
    """Returns a tfds configuration per category."""
    return [tfds.core.BuilderConfig(name=name) for name in categories]


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base class of sets with categories, each with training and test images.

    Image files are stored byte for byte, in the order of `splits`. By default `<manual_dir>` is the
    directory of the category, in the layout of MVTec AD.
    """

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = ""
    HOMEPAGE = ""
    CITATION = ""
    LICENCE = ""
    HAS_MASKS = True
    GOOD_NAME = GOOD  # directories of normal images
    MASK_SUFFIX = "_mask"

    def splits(self, folder: Path) -> Splits:
        """Returns the files of `category` in the directory of raw files."""
        return read_layout(folder, good=self.GOOD_NAME, mask_suffix=self.MASK_SUFFIX, complete=True)

    @property
    def category(self) -> str:
        """Name of the category."""
        assert self.builder_config is not None
        return self.builder_config.name

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["good", "anomalous"]),
            "defect": tfds.features.Text(),
            "name": tfds.features.Text(),
        }
        if self.HAS_MASKS:
            features["mask"] = tfds.features.Image(shape=(None, None, 1))
        return dataset_info(self, features, self.DESCRIPTION, self.HOMEPAGE, self.CITATION)

    def _split_generators(self, dl_manager):
        splits = self.splits(Path(dl_manager.manual_dir))
        return {name: self._generate_examples(records) for name, records in splits.items()}

    def _generate_examples(self, records: Sequence[Record]) -> Iterator[tuple[int, dict]]:
        title = f"preparing {self.name}/{self.category}"
        for key, record in enumerate(tqdm(records, desc=title, unit="image", delay=1)):
            example = {
                "image": _read_checked(record.image),
                "label": int(record.defect != GOOD),
                # Bytes of file names that are not UTF-8 are escaped.
                "defect": record.defect.encode(errors="backslashreplace"),
                "name": record.name.encode(errors="backslashreplace"),
            }
            if self.HAS_MASKS and record.mask:
                example["mask"] = _read_checked(record.mask)
            elif self.HAS_MASKS:
                example["mask"] = _blank_mask(*read_header(record.image).size)
            yield key, example


def dataset_info(
    builder: tfds.core.DatasetBuilder,
    features: dict[str, Any],
    description: str,
    homepage: str,
    citation: str | None = None,
) -> tfds.core.DatasetInfo:
    """Returns the tfds description of a data set whose examples keep their order."""
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


def _read_checked(path: Path) -> bytes:
    data = read_file(path)
    check_image(data, str(path))
    return data


@functools.lru_cache(maxsize=16)
def _blank_mask(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def open_category(
    builder_class: type[Builder],
    config: DataConfig,
    find_raw: Callable[[], Raw],
    counts: Mapping[str, tuple[int, int]] | None = None,
) -> Dataset:
    """Opens the category `config.category`, after preparing it if needed.

    Args:
        builder_class: builder of the data set.
        config: `config.data`.
        find_raw: see `prepare`.
        counts: official numbers of training and test images by category; others are a warning.

    Raises:
        InputError: an unknown category, or the errors of `prepare`.
    """
    names = [each.name for each in builder_class.BUILDER_CONFIGS]
    category = check_choice("data.category", config.category, names)
    builder = prepare(builder_class, category, config, find_raw)
    train, test = source(builder, "train"), source(builder, "test")
    if counts is not None:
        check_counts(builder.info.full_name, (len(train), len(test)), counts[category])
    labels = {"category": category, "licence": builder_class.LICENCE}
    return Dataset(builder_class.name, train, test, provenance(builder) | labels)


def data_dir(config: DataConfig) -> Path:
    """Returns the directory of prepared sets: `config.dir`, TFDS_DATA_DIR or the tfds default."""
    folder = config.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return expanded(folder)


def prepare(
    builder_class: type[tfds.core.GeneratorBasedBuilder],
    builder_config: str | None,
    config: DataConfig,
    find_raw: Callable[[], Raw],
) -> tfds.core.DatasetBuilder:
    """Returns a builder whose data set is prepared, after preparing it if needed.

    tfds writes to a temporary directory and renames it at the end, so that an interrupted
    preparation is never mistaken for a complete one.

    Args:
        builder_class: builder of the data set.
        builder_config: name of its configuration, or None if it has none.
        config: `config.data`.
        find_raw: finds the raw files; called only if the set is not prepared yet.

    Raises:
        InputError: missing raw data, a broken image, a directory that cannot be written to or whose
            name is not UTF-8, or a set that was prepared from another root.
    """
    folder = data_dir(config)
    if not is_utf8(folder):
        raise InputError(
            f"{folder} is not UTF-8, as array_record requires. Set data.dir to another directory."
        )

    def make_builder() -> tfds.core.DatasetBuilder:
        try:
            return builder_class(data_dir=folder, config=builder_config)
        except Exception as error:  # protobuf, json and tfds raise their own types
            raise _damaged(folder / builder_class.name / (builder_config or ""), error) from error

    builder = make_builder()
    if builder.data_path.exists():
        _check_prepared(builder, config.root)
        return builder
    _write(builder, find_raw())
    # Remove directories of killed processes. An etils path would interpret brackets as a pattern.
    for leftover in Path(builder.data_path).parent.glob("incomplete.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return make_builder()


def _write(builder: tfds.core.DatasetBuilder, raw: Raw) -> None:
    metadata: Any = builder.info.metadata
    metadata["source"] = raw.source
    try:
        tfds.disable_progress_bar()  # nothing is downloaded
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=raw.folder),
                file_format="array_record",
            )
    except (OSError, RuntimeError) as error:  # array_record raises the latter on a full disk
        if not builder.data_path.exists():  # unless another process prepared it
            raise InputError(
                f"{builder.info.full_name} cannot be written to {builder.data_dir} ({error}). "
                "Free disk space there, or set data.dir to another directory."
            ) from error
    finally:
        tfds.enable_progress_bar()


def _check_prepared(builder: tfds.core.DatasetBuilder, root: str | None) -> None:
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        kind = file_format and file_format.value
        raise InputError(
            f"{builder.data_dir} is prepared as {kind}, but only array_record can be read without "
            "TensorFlow. Set data.dir to another directory to prepare it there."
        )
    source = _source_of(builder)
    if root is not None and source != str(expanded(root).resolve()):
        raise InputError(
            f"{builder.data_dir} was prepared from {source}, not from data.root {root}. "
            "Unset data.root, remove that directory, or set data.dir to another one."
        )


def _source_of(builder: tfds.core.DatasetBuilder) -> str:
    metadata: Any = builder.info.metadata or {}
    return metadata.get("source", "elsewhere")


def _damaged(folder: os.PathLike | str, error: Exception) -> InputError:
    first_line = str(error).partition("\n")[0]
    return InputError(
        f"The prepared data set in {folder} is damaged ({first_line}). Remove it and run again."
    )


def read(builder: tfds.core.DatasetBuilder, split: str) -> tuple[Sequence[dict], list[dict]]:
    """Returns the examples of a split, read on demand, and their fields other than images.

    Images and masks are the bytes of their files.

    Raises:
        InputError: the prepared files are damaged.
    """
    as_data_source: Any = builder.as_data_source  # its decorator hides the signature
    images = ("image", "mask") if _has_masks(builder) else ("image",)
    decoders = {name: tfds.decode.SkipDecoding() for name in images}
    try:
        data = as_data_source(split, decoders=decoders)
        rest = [{k: v for k, v in example.items() if k not in images} for example in data]
    except Exception as error:  # array_record, protobuf and tfds raise their own types
        raise _damaged(builder.data_dir, error) from error
    return data, rest


def _has_masks(builder: tfds.core.DatasetBuilder) -> bool:
    features: Any = builder.info.features
    return "mask" in features


def source(builder: tfds.core.DatasetBuilder, split: str) -> Source:
    """Returns the source of one split, with the errors of `read`; only test images have masks."""
    data, rest = read(builder, split)
    names = tuple(example["name"].decode() for example in rest)
    defects = tuple(example["defect"].decode() for example in rest)
    has_masks = split == "test" and _has_masks(builder)
    cut: set[str] = set()

    titles = [f"{builder.info.full_name}: {name}" for name in names]

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        example, title = data[index], titles[index]
        image = decode_image(example["image"], title)
        if not has_masks:
            return image, None
        if defects[index] == GOOD:
            return image, np.zeros(image.shape[:2], bool)
        mask = decode_mask(example["mask"], f"the mask of {title}", on_cut=cut.add)
        return image, mask

    def header(index: int) -> Header:
        with open_image(io.BytesIO(data[index]["image"]), titles[index]) as image:
            return header_of(image, titles[index])

    return Source(names, defects, load, header=header, cut_masks=cut)


def provenance(builder: tfds.core.DatasetBuilder) -> dict:
    """Returns the origin, directory and numbers of images of a prepared data set."""
    counts = {f"{name}_images": split.num_examples for name, split in builder.info.splits.items()}
    prepared = {"source": _source_of(builder), "prepared": os.fspath(builder.data_dir)}
    return prepared | counts
