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

from fastflow_jax.data import masks
from fastflow_jax.data.dataset import (
    GOOD,
    Counts,
    DataConfig,
    Dataset,
    Record,
    Regions,
    Source,
    check_choice,
    check_counts,
)
from fastflow_jax.data.formats import Header, header_of, open_image, read_header
from fastflow_jax.data.layout import Layout, Splits, read_layout
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
    """Base class of sets with training and test images, usually in categories.

    Image files are stored byte for byte, in the order of `splits`. By default `<manual_dir>` is the
    directory of the category, in the layout of MVTec AD.
    """

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = ""
    HOMEPAGE = ""
    CITATION = ""
    LICENCE = ""
    # For `catalogue`: size of the download; numbers of images, "" for those of the module's COUNTS;
    # and source of the files, "" for HOMEPAGE.
    SIZE, IMAGES, SOURCE = "not stated", "", ""
    LAYOUT = Layout(calibration=None, is_complete=True)
    # Where the raw files are, see `manual.find_raw`: names of archives; directories of a category,
    # below that of the set; and the name of a file or directory in each of them.
    ARCHIVES: tuple[str, ...] = ()
    PLACES: tuple[str, ...] = ("{category}",)
    CONTAINS = "train"
    HAS_REGIONS = False  # whether each mask file of an image is a region, see `Source.regions`

    def splits(self, folder: Path) -> Splits:
        """Returns the files of `category` in the directory of raw files."""
        return read_layout(folder, self.LAYOUT)

    @property
    def category(self) -> str:
        """Name of the category, or "" if the set has none."""
        return "" if self.builder_config is None else self.builder_config.name

    @property
    def has_masks(self) -> bool:
        """Whether the test images of `category` have masks."""
        return True

    def saturations(self, record: Record) -> list[float]:
        """Returns the saturation of each region of an image, see `Regions`."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["good", "anomalous"]),
            "defect": tfds.features.Text(),
            "name": tfds.features.Text(),
        }
        if self.has_masks:
            features["mask"] = tfds.features.Image(shape=(None, None, 1))
        if self.HAS_REGIONS:
            features["regions"] = tfds.features.Sequence(tfds.features.Text())
            features["saturations"] = tfds.features.Sequence(tfds.features.Scalar(np.float32))
        return dataset_info(self, features, self.DESCRIPTION, self.HOMEPAGE, self.CITATION)

    def _split_generators(self, dl_manager):
        splits = self.splits(Path(dl_manager.manual_dir))
        return {name: self._generate_examples(records) for name, records in splits.items()}

    def _generate_examples(self, records: Sequence[Record]) -> Iterator[tuple[int, dict]]:
        title = f"preparing {self.name} {self.category}".rstrip()
        for key, record in enumerate(tqdm(records, desc=title, unit="image", delay=1)):
            example = {
                "image": _read_checked(record.image),
                "label": int(record.defect != GOOD),
                # Bytes of file names that are not UTF-8 are escaped.
                "defect": record.defect.encode(errors="backslashreplace"),
                "name": record.name.encode(errors="backslashreplace"),
            }
            if self.has_masks:
                example["mask"] = _mask(record)
            if self.HAS_REGIONS:
                example["regions"] = [_read_checked(path) for path in record.masks]
                example["saturations"] = self.saturations(record)
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


def _mask(record: Record) -> bytes:
    """Content of a mask file: the only one, or the union of several."""
    if len(record.masks) == 1:
        return _read_checked(record.masks[0])
    size = read_header(record.image).size
    return _png(masks.read(record, size)) if record.masks else _blank_mask(*size)


@functools.lru_cache(maxsize=16)
def _blank_mask(height: int, width: int) -> bytes:
    return _png(np.zeros((height, width), bool))


def _png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask * np.uint8(255)).save(file, "PNG")
    return file.getvalue()


def open_category(
    builder_class: type[Builder],
    config: DataConfig,
    find_raw: Callable[[], Raw],
    counts: Mapping[str, Counts] | None = None,
) -> Dataset:
    """Opens the category `config.category`, after preparing it if needed.

    Args:
        builder_class: builder of the data set.
        config: `config.data`.
        find_raw: see `prepare`.
        counts: official numbers of training and test images by category, by "" for a set without
            categories; others are a warning.

    Raises:
        InputError: an unknown category, or the errors of `prepare`.
    """
    names = [each.name for each in builder_class.BUILDER_CONFIGS]
    category = config.category
    if names:
        category = check_choice("data.category", category, names)
    elif category is not None:
        raise InputError(
            f"data.category is {category!r}, but {builder_class.name} has no categories. Unset it."
        )
    builder = prepare(builder_class, category, config, find_raw)
    sources = {name: source(builder, name) for name in builder.info.splits}
    train, test = sources["train"], sources["test"]
    if counts is not None:
        check_counts(builder.info.full_name, (len(train), len(test)), counts[category or ""])
    labels = {"category": category, "licence": builder_class.LICENCE}
    about = provenance(builder) | labels
    return Dataset(builder_class.name, train, test, about, sources.get("calibration"))


def data_dir(folder: str | None = None) -> Path:
    """Returns the directory of prepared sets: `folder`, TFDS_DATA_DIR or the tfds default."""
    folder = folder or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
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
    folder = data_dir(config.dir)
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
    images = ("image", "mask") if _has(builder, "mask") else ("image",)
    decoders = {name: tfds.decode.SkipDecoding() for name in images}
    large = (*images, "regions")
    try:
        data = as_data_source(split, decoders=decoders)
        rest = [{k: v for k, v in example.items() if k not in large} for example in data]
    except Exception as error:  # array_record, protobuf and tfds raise their own types
        raise _damaged(builder.data_dir, error) from error
    return data, rest


def _has(builder: tfds.core.DatasetBuilder, name: str) -> bool:
    features: Any = builder.info.features
    return name in features


def source(builder: tfds.core.DatasetBuilder, split: str) -> Source:
    """Returns the source of one split, with the errors of `read`; only test images have masks."""
    data, rest = read(builder, split)
    names = tuple(example["name"].decode() for example in rest)
    defects = tuple(example["defect"].decode() for example in rest)
    has_masks = split == "test" and _has(builder, "mask")
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

    def regions(index: int) -> Regions:
        example, title = data[index], f"a mask of {titles[index]}"
        shape = (0, *header(index).size)
        found = [decode_mask(bytes(mask), title)[None] for mask in example["regions"]]
        saturations = np.asarray(example["saturations"], np.float32)
        return Regions(np.concatenate([np.zeros(shape, bool), *found]), saturations)

    has_regions = split == "test" and _has(builder, "regions")
    regions_of = regions if has_regions else None
    return Source(names, defects, load, header=header, cut_masks=cut, regions=regions_of)


def provenance(builder: tfds.core.DatasetBuilder) -> dict:
    """Returns the origin, directory and numbers of images of a prepared data set."""
    counts = {f"{name}_images": split.num_examples for name, split in builder.info.splits.items()}
    prepared = {"source": _source_of(builder), "prepared": os.fspath(builder.data_dir)}
    return prepared | counts
