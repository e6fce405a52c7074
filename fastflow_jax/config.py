"""Configuration: default fields, fields that depend on the backbone, and checks of values."""

import contextlib
import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fastflow_jax.backbones import Backbone, check_layers, spec_of
from fastflow_jax.backbones.weights import normalisation, origin
from fastflow_jax.data.changes import bounds_of
from fastflow_jax.data.levels import Levels
from fastflow_jax.data.roi import AUTO as ROI_AUTO
from fastflow_jax.data.transforms import MASK_RESIZES, RESIZES
from fastflow_jax.detectors.base import DETECTORS, method
from fastflow_jax.errors import InputError
from fastflow_jax.features.cache import CACHE_LOCATIONS
from fastflow_jax.features.extract import DTYPES
from fastflow_jax.files import expanded, to_plain
from fastflow_jax.parallel import KINDS


def default() -> ConfigDict:
    """The default configuration. `fill` sets fields that are None and depend on the backbone."""
    c = ConfigDict()
    c.seed = 0  # of parameters, permutations, the order of images, and random backbones
    c.seeds = 1  # number of runs, with seeds from `seed` on; the table reports mean and deviation
    c.one_model = False  # True trains one model of all categories, see docs/products.md
    c.products = 0  # number of products of a model, set by a run with `one_model`
    # A name of `detectors.base.DETECTORS`; "auto": by the number of images, see docs/few_images.md
    c.detector = "fastflow"
    c.parallel = "pmap"  # or "jit": how a batch is split over the devices of this machine
    c.data = _data()
    c.augment = _augment()

    # Backbone
    c.published = False  # True sets fields that are None to the values published for the backbone
    c.backbone = "tf_efficientnet_lite0"  # or another of the table in docs/models.md
    c.weights = placeholder(str)  # a file, a timm tag or "random"; None: the default source
    c.mean = placeholder(tuple)  # per channel, of images in [0, 1]; None: that of the weights
    c.std = placeholder(tuple)  # likewise; images become (image - mean) / std
    c.function = _function()
    c.image_size = placeholder(tuple)  # of the input: (height, width), or (side,)
    c.layers = placeholder(tuple)  # names of feature maps; None: the default of the detector
    c.layers_as = placeholder(str)  # detector whose default layers are read, if not its own
    c.length_power = 0.5  # exponent of the lengths of feature vectors, see `extract.compress`
    c.feature_dtype = "float16"  # of cached features; or "bfloat16", "float32"
    c.batch_size = placeholder(int)  # of the backbone and of scoring; training has its own

    c.train = _train()
    for name in DETECTORS:
        for section, fields in method(name).fields.items():
            unset = {k: placeholder(v) for k, v in fields.items() if isinstance(v, type)}
            c[section] = ConfigDict({**fields, **unset})
    # Standard deviation of the blur of all anomaly maps, see `detectors.maps.resize_map`
    c.map.sigma = 4.0

    # Ablations: the changes of each run by the name of its row
    c.variants = ConfigDict()

    # Outputs of a run
    c.checkpoint_every = 1  # epochs between checkpoints
    c.evaluate_every = 0  # epochs between evaluations on test images, for study; 0: at the end
    c.audit = 0.08  # share of the normal images that the report and --mode=audit list; 0: none
    c.metrics = ()  # in tables and reports; (): the first five in `table.TITLES` that have values
    c.heatmaps = 40  # largest number of heat maps
    c.report = True  # report.html, see report/html.py
    c.report_pictures = 2000  # largest number of images in the reports of a run
    return c


def _function() -> ConfigDict:
    """A backbone of Python, see `Backbone.from_function`; set by `Detector.fit(backbone=...)`."""
    c = ConfigDict()
    c.layers = placeholder(tuple)  # names of its maps; None: the backbone is not a function
    c.channels = placeholder(tuple)  # of each map
    c.strides = placeholder(tuple)  # likewise, in pixels of the input
    c.sha256 = placeholder(str)  # of its variables
    c.probe = placeholder(tuple)  # of its code, see `Backbone.probe`
    return c


def _data() -> ConfigDict:
    c = ConfigDict()
    c.name = "folder"  # or another name that `fastflow-jax data` lists
    c.category = placeholder(str)  # of that data set
    c.root = placeholder(str)  # directory of images
    c.manifest = placeholder(str)  # list of images of "folder", see data/manifest.py
    c.dir = placeholder(str)  # prepared tfds sets; None: $TFDS_DATA_DIR, or the default of tfds
    c.holdout = 0.1  # share of training images held out for calibration and thresholds
    # Folds of the training images, each scored by a detector of the others for calibration and
    # thresholds, see `evaluation.folds`; 0: images are held out
    c.folds = 0
    # Groups of training images that show the same part and are held out together: "folder", a .csv
    # file or a regular expression, see `data.groups.labels_of`; None: every image is its own group
    c.groups = placeholder(str)
    c.exclude = placeholder(str)  # file with names of normal images to leave out, a line each
    # Region of interest, whose pixels alone train, score and count: a mask of all images, white
    # where pixels count; or "auto", the foreground of each image; None: all pixels, see `data.roi`
    c.roi = placeholder(str)
    c.roi_dir = placeholder(str)  # directory with a mask for each image
    # Levels of images of more than 8 bits, see docs/data.md; None: their high byte
    c.bits = placeholder(int)  # of the camera, in files of 16 bits
    c.window = placeholder(tuple)  # (low, high) percentiles of the training images, from 0 to 100
    c.levels = placeholder(tuple)  # (black, white) of the window, set by a run
    c.resize = "square"  # stretches to the input; or "crop", "pad": see `transforms.placement`
    c.mask_resize = "nearest"  # or "floor", "threshold": see `transforms.resize_mask`
    # Side of the tiles that images are cut into, in pixels; None: images are not cut. See
    # docs/tiles.md
    c.tile = placeholder(int)
    c.resolution = placeholder(int)  # longer side of images before they are cut; None: their own
    c.train_tiles = 4096  # largest number of tiles to train on
    c.aligned = False  # True: parts are at the same place in all images, see docs/tiles.md
    # Changes of the test images and their masks, to measure robustness
    c.tamper = ConfigDict()
    c.tamper.rotate = 0.0  # degrees, counter-clockwise
    c.tamper.zoom = 1.0  # factor; the image grows above 1
    c.tamper.down = 0.0  # shift, as a part of the height
    c.tamper.right = 0.0  # shift, as a part of the width
    return c


def _augment() -> ConfigDict:
    """Random changes of training images, up to these bounds."""
    c = ConfigDict()
    # Changed copies of each image, with cached features, for all detectors; 0: images change in
    # every epoch, and their features are not cached
    c.copies = 0
    c.flips = False  # left-right and upside-down, each with probability 1/2
    c.rotate = 0.0  # largest angle in degrees, in either direction
    c.colour = 0.0  # largest relative change of brightness, contrast and saturation
    return c


def _train() -> ConfigDict:
    c = ConfigDict()
    c.steps = 500  # rounded to whole epochs
    c.max_epochs = 10  # largest number of epochs, to avoid overfitting to few images
    c.epochs = placeholder(int)  # replaces `steps` and `max_epochs` if set
    c.batch_size = 8  # of training
    c.window = 16  # side of the random window of each map in a step, in locations; 0: whole maps
    c.drop_last = False  # True drops a short last batch, as in the reference
    c.loss = "per_dimension"  # or "sum", as in the reference
    c.optimizer = "adam"  # or "sgd"
    c.beta2 = 0.99  # of Adam; lower than usual because trainings are short
    c.learning_rate = 3e-3  # the highest of the schedule
    c.schedule = "cosine"  # decays to zero; or "constant"
    c.warmup = 0.1  # share of all steps in which the rate rises from zero
    c.weight_decay = 0.0  # L2 regularisation, as in torch's Adam
    c.clip = 1.0  # largest global norm of the gradient; 0: no clipping
    c.seeds_at_once = placeholder(int)  # trained in one program; None: all on GPU or TPU
    c.cache = "auto"  # where features are cached, see `features.cache.CACHE_LOCATIONS`
    return c


def with_function(config: ConfigDict, backbone: Backbone) -> ConfigDict:
    """Returns a copy that names a backbone of `Backbone.from_function`.

    Raises:
      InputError: the backbone is none of these, or the configuration has fields of another.
    """
    image_size = _size(config.image_size or backbone.spec.image_size)
    if (probe := backbone.probe(image_size)) is None:
        raise InputError(
            f"{backbone.name} is not a function. Set config.backbone and config.weights instead."
        )
    for field in ("weights", "layers", "layers_as"):
        if config[field] is not None:
            raise InputError(
                f"config.{field} has no effect on the backbone {backbone.name}, whose maps are all "
                "used. Leave it out."
            )
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.backbone, c.layers = backbone.name, backbone.layers
        c.mean, c.std = c.mean or backbone.spec.mean, c.std or backbone.spec.std
        c.image_size, c.function.probe = image_size, probe
        c.function.layers, c.function.channels = backbone.layers, backbone.channels
        c.function.strides, c.function.sha256 = backbone.strides, backbone.weights["sha256"]
    return c


def name_data(config: ConfigDict, argument: str) -> None:
    """Sets data set and category from <data set>[/<category>]; empty parts change nothing."""
    name, _, category = argument.partition("/")
    config.data.name = name or config.data.name
    config.data.category = category or config.data.category


AUTO = "auto"  # `config.detector` that depends on the number of images, see `runs.few_images`

# Pixels of a default batch: 32 images of 256x256. EfficientNet-Lite0 needs about 200 bytes per
# pixel, and larger batches are not faster on a CPU.
_PIXELS_AT_A_TIME = 2**21

# Fields that may differ between a run and its continuation.
_FREE_TO_CHANGE = (
    *("parallel", "audit", "metrics", "heatmaps", "report", "report_pictures"),
    *("batch_size", "data.dir", "flow.reversible", "train.cache", "train.seeds_at_once"),
    "function.probe",  # compared with a tolerance, see `saved.load_backbone`
)

# Fields of earlier versions that did not affect results; old run directories have them.
_RETIRED = ("measure_speed",)

# Values of fields that earlier versions did not have, for run directories without them.
_BEFORE = {"map.border": 1, "map.coarse_weight": 1.0, "map.feature_weight": 1.0}

# Fields that all variants of a run share.
_SHARED = (
    *("data.name", "data.category", "data.root", "data.manifest", "data.dir", "data.exclude"),
    *("data.roi", "data.roi_dir"),
    *("data.bits", "data.window", "data.levels"),
    *("seed", "seeds", "metrics", "report", "report_pictures"),
)

# Fields that all detectors read, in sections that only some detectors read; with a final dot.
_READ_BY_ALL = ("map.sigma.", "train.cache.")

_CHOICES = {
    "detector": DETECTORS,
    "train.loss": ("per_dimension", "sum"),
    "train.optimizer": ("adam", "sgd"),
    "train.cache": CACHE_LOCATIONS,
    "train.schedule": ("cosine", "constant"),
    "feature_dtype": DTYPES,
    "parallel": KINDS,
    "data.resize": RESIZES,
    "data.mask_resize": MASK_RESIZES,
}

# Lowest and highest values of numbers.
_BOUNDS = {
    "seed": (0, 2**31),
    "seeds": (1, 1000),
    "products": (0, 10_000),
    "data.holdout": (0, 0.5),
    "data.folds": (0, 1000),
    "data.tile": (16, 10**6),
    "data.resolution": (16, 10**6),
    "data.train_tiles": (1, 10**9),
    "data.tamper.rotate": (-180, 180),
    "data.tamper.zoom": (0.1, 10),
    "data.tamper.down": (-1, 1),
    "data.tamper.right": (-1, 1),
    "augment.copies": (0, 64),
    "augment.rotate": (0, 180),
    "augment.colour": (0, 1),
    "length_power": (0, 1),
    "batch_size": (1, 10**6),
    "train.steps": (1, 10**9),
    "train.epochs": (1, 10**9),
    "train.max_epochs": (1, 10**9),
    "train.batch_size": (1, 10**6),
    "train.window": (0, 10**6),
    "train.learning_rate": (0, 1e12),
    "train.warmup": (0, 0.9),
    "train.weight_decay": (0, 1e6),
    "train.clip": (0, 1e12),
    "train.beta2": (0, 1 - 1e-9),
    "train.seeds_at_once": (1, 1000),
    "map.sigma": (0, 100),
    "checkpoint_every": (1, 10**9),
    "evaluate_every": (0, 10**9),
    "audit": (0, 0.5),
    "heatmaps": (0, 10**6),
    "report_pictures": (0, 10**6),
}


def fill(config: ConfigDict) -> ConfigDict:
    """Returns a copy with all fields set and checked.

    Each variant lists all of its differences from the run, such as the input size and the feature
    maps of another backbone. A detector of "auto" is FastFlow, see `runs.few_images.resolve`.

    Args:
      config: a configuration with the fields of `default`.

    Raises:
      InputError: a value is not possible, or no detector of the run reads a changed field.
    """
    config = config.copy_and_resolve_references()
    if config.detector == AUTO:
        config.detector = "fastflow"
    c = _fill(config)
    plain = _flat(c.to_dict())
    c.unlock()
    names = _names_of_variants(config)
    detectors = [config.variants[name].get("detector", config.detector) for name in names]
    base = {k: v for k, v in config.to_dict().items() if k != "variants"}
    _check_read("config", config, base, detectors or [config.detector])
    for name, detector in zip(names, detectors, strict=True):
        changes, field = config.variants[name], f"config.variants.{name}"
        changed = _flat(changes.to_dict())
        if unknown := changed.keys() - plain.keys():
            raise InputError(f"{field} has no field {min(unknown)}. Check the spelling.")
        if shared := changed.keys() & set(_SHARED):
            raise InputError(
                f"{field} changes {min(shared)}, which all variants share. Make it a separate run."
            )
        variant = _changed(config, changes)
        _check_read(field, variant, changes.to_dict(), [detector])
        filled = _flat(_fill(variant).to_dict())
        c.variants[name] = ConfigDict(
            _nested({field: v for field, v in filled.items() if v != plain.get(field)})
        )
    return c.lock()


def _check_read(
    name: str, config: ConfigDict, changes: dict[str, Any], detectors: Sequence[str]
) -> None:
    """Raises InputError if a field was changed and none of the detectors reads it.

    Values that `fill` sets are not changes, so that a filled configuration can be filled again.

    Args:
      name: of the configuration or variant in the message.
      config: with all of its fields.
      changes: the fields to check.
      detectors: names of the detectors of the run.
    """
    usual = _flat(default().to_dict())
    unread = {
        field: value
        for field, value in _flat(changes).items()
        if _is_unread(field, detectors) and value != usual[field]
    }
    if not unread:
        return
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        plain.update_from_flattened_dict({field: usual[field] for field in unread})
    filled = _flat(_fill(plain).to_dict())
    for field, value in unread.items():
        if value != filled[field]:
            raise InputError(
                f"{name}.{field} has no effect on {' and '.join(dict.fromkeys(detectors))}. Leave "
                f"it at its default, {usual[field]}."
            )


def _is_unread(field: str, detectors: Iterable[str]) -> bool:
    """Whether detectors read a field, but none of these."""

    def read_by(names: Iterable[str]) -> bool:
        prefixes = [f"{each}." for name in names for each in method(name).reads]
        return any(f"{field}.".startswith(prefix) for prefix in prefixes)

    of_all = any(f"{field}.".startswith(prefix) for prefix in _READ_BY_ALL)
    return read_by(DETECTORS) and not of_all and not read_by(detectors)


def variants(config: ConfigDict) -> dict[str | None, ConfigDict]:
    """The configuration of each variant by name; without variants, the configuration under None."""
    names = _names_of_variants(config)
    return {name: _changed(config, config.variants[name]) for name in names} or {None: config}


def _names_of_variants(config: ConfigDict) -> list[str]:
    """Names in the order in which they were set; a ConfigDict sorts its fields."""
    return list(to_plain(config)["variants"])


def _changed(config: ConfigDict, changes: ConfigDict) -> ConfigDict:
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.variants = ConfigDict()
        c.update(changes)
    return c


def _fill(config: ConfigDict) -> ConfigDict:
    """Returns a filled copy, without filling variants; see `fill`."""
    c = config.copy_and_resolve_references()
    c.unlock()
    spec = spec_of(c)
    if c.mean is None and c.std is None and c.function.layers is None:
        with contextlib.suppress(InputError):  # raised again when the weights are read
            mean, std = normalisation(spec, origin(spec, c.weights))
            if (mean, std) != (spec.mean, spec.std):
                c.mean, c.std = mean, std
    tile = None if c.data.tile is None else (c.data.tile,)
    c.image_size = _size(c.image_size or tile or spec.image_size)
    if c.batch_size is None:
        c.batch_size = max(1, min(32, _PIXELS_AT_A_TIME // math.prod(c.image_size)))
    c.metrics = tuple(name for each in c.metrics for name in each.split(",") if name)
    _check_choice("detector", c.detector, DETECTORS)
    _check_choice("layers_as", c.layers_as or c.detector, DETECTORS)
    c.layers = check_layers(spec, c.layers or method(c.layers_as or c.detector).layers(c, spec))
    _check_values(c)
    _check_copies(c.augment)
    if c.one_model:
        check_one_model(c)
    _check_folds(c.data)
    _check_tiles(c)
    _check_region(c)
    _check_levels(c)
    for name in DETECTORS:
        method(name).fill(c, spec)
    for field in ("root", "manifest", "exclude", "roi", "roi_dir"):
        if c.data[field] not in (None, ROI_AUTO):
            c.data[field] = str(expanded(c.data[field]).resolve())
    if c.data.manifest is not None and c.data.name != "folder":
        raise InputError(
            f"config.data.manifest has no effect on {c.data.name}. Set config.data.name to folder."
        )
    if c.data.dir is not None:
        expanded(c.data.dir)  # raises for a URL, before anything is written
    if c.weights is not None and expanded(c.weights).is_file():
        c.weights = str(expanded(c.weights).resolve())
    return c.lock()


def _check_values(config: ConfigDict) -> None:
    """Raises InputError if a field has a value that is none of its choices or out of bounds."""
    methods = [method(name) for name in DETECTORS]
    values = _flat(config.to_dict())
    for choices in (_CHOICES, *(m.choices for m in methods)):
        for field, allowed in choices.items():
            if values[field] is not None:
                _check_choice(field, values[field], allowed)
    for bounds in (_BOUNDS, *(m.bounds for m in methods)):
        for field, (low, high) in bounds.items():
            if values[field] is not None and not low <= values[field] <= high:
                raise InputError(
                    f"config.{field} must be from {low} to {high}, not {values[field]}."
                )


def _check_copies(augment: ConfigDict) -> None:
    if augment.copies and not any(bounds_of(augment).values()):
        raise InputError(
            f"config.augment.copies is {augment.copies}, but copies would equal their images. Set "
            "config.augment.rotate, config.augment.flips or config.augment.colour."
        )


def check_one_model(config: ConfigDict) -> None:
    """Raises InputError if fields do not suit one model of several products.

    Args:
      config: filled; the model may also be one of a dictionary of images, without
        `config.one_model`.
    """
    for field, usual in (("seeds", 1), ("evaluate_every", 0)):
        if config[field] != usual:
            raise InputError(f"config.one_model needs config.{field}={usual}. Leave {field} out.")
    if len(config.variants):
        raise InputError("config.one_model has no variants. Make each variant a separate run.")
    for field in ("tile", "roi", "roi_dir"):
        if config.data[field] is not None:
            raise InputError(
                f"config.data.{field} is not possible for one model of several products. Leave it "
                "out, or train a detector for each product."
            )
    if config.data.folds and method(config.detector).fit_shared is not None:
        raise InputError(
            "config.data.folds would train flows of single products instead of the shared ones. "
            "Leave it out, and set config.data.holdout."
        )
    if config.data.window is not None and config.data.levels is None:
        raise InputError(
            "config.data.window is for one product. For a model of several, set config.data.levels "
            "to (black, white), the same for all of them."
        )


def _check_folds(section: ConfigDict) -> None:
    if section.folds == 1 or (section.folds and section.holdout):
        raise InputError(
            f"config.data.folds is {section.folds} and config.data.holdout is {section.holdout}. "
            "Set folds to 0, or to at least 2 with a holdout of 0."
        )


def _check_tiles(config: ConfigDict) -> None:
    """Raises InputError if fields do not suit tiles, or have no effect without them."""
    if config.data.tile is None:
        for field, usual in (("resolution", None), ("train_tiles", 4096), ("aligned", False)):
            if config.data[field] != usual:
                raise InputError(
                    f"config.data.{field} has no effect without config.data.tile. Set that as well."
                )
        return
    for field, value, usual in (
        ("data.folds", config.data.folds, 0),
        ("data.roi", config.data.roi, None),
        ("data.roi_dir", config.data.roi_dir, None),
        ("evaluate_every", config.evaluate_every if config.data.aligned else 0, 0),
    ):
        if value != usual:
            raise InputError(
                f"config.{field} is {value}, which is not possible with config.data.tile. Leave "
                "one of them out."
            )


def _check_region(config: ConfigDict) -> None:
    """Raises InputError if a region of interest does not suit the rest of the configuration."""
    section, augment = config.data, config.augment
    if section.roi is None and section.roi_dir is None:
        return
    if section.roi is not None and section.roi_dir is not None:
        raise InputError(
            "config.data.roi and config.data.roi_dir are both set. Leave one of them out."
        )
    is_moved = augment.flips or augment.rotate
    if section.roi_dir is not None and (is_moved or section.tamper != default().data.tamper):
        raise InputError(
            "config.data.roi_dir has masks of unchanged images, which must not be flipped, turned "
            "or moved. Leave config.augment.flips, config.augment.rotate and config.data.tamper "
            "out."
        )
    if section.roi == ROI_AUTO and not augment.copies and any(bounds_of(augment).values()):
        raise InputError(
            "config.data.roi=auto needs images that are the same in every epoch. Set "
            "config.augment.copies, or leave config.augment out."
        )


def _check_levels(config: ConfigDict) -> None:
    """Raises InputError if the levels of `config.data` have no effect, or see `Levels.of`."""
    section = config.data
    for field in ("bits", "window", "levels"):
        if section[field] is not None and section.name != "folder":
            raise InputError(
                f"config.data.{field} has no effect on {section.name}. Leave it out, or set "
                "config.data.name to folder."
            )
    Levels.of(section)


def _check_choice(field: str, value: str, choices) -> None:
    if value not in choices:
        raise InputError(f"config.{field} must be one of {', '.join(choices)}, not {value!r}.")


def _size(size) -> tuple[int, int]:
    """(side,) or (height, width) -> (height, width)."""
    if not all(isinstance(side, int) and side > 0 for side in size) or len(size) not in (1, 2):
        raise InputError(
            f"config.image_size must be (side,) or (height, width), not {tuple(size)}."
        )
    return (size[0], size[-1])


def from_plain(plain: dict) -> ConfigDict:
    """Returns the filled configuration of a run or a saved detector; the inverse of `to_plain`.

    Raises:
      InputError: a field does not exist in this version, or has an impossible value.
    """

    def with_tuples(section):
        return {
            k: with_tuples(v) if isinstance(v, dict) else tuple(v) if isinstance(v, list) else v
            for k, v in section.items()
        }

    if not isinstance(plain, dict):
        raise InputError("The configuration is not an object. Restore it, or train again.")
    config = default()
    needed = {field for field, value in _flat(config.to_dict()).items() if value is not None}
    needed |= {"image_size", "layers", "batch_size"}
    config.update_from_flattened_dict(_BEFORE)
    plain = {name: value for name, value in plain.items() if name not in _RETIRED}
    unknown = _flat(plain).keys() - _flat(config.to_dict()).keys()
    unknown = [name for name in sorted(unknown) if not name.startswith("variants.")]
    if unknown:
        raise InputError(
            f"The configuration was written by another version: there is no field {unknown[0]!r}. "
            "Install that version, or train again."
        )
    with config.unlocked():
        try:
            config.update(with_tuples(plain))
        except (TypeError, ValueError, AttributeError, KeyError) as error:  # of ml_collections
            raise InputError(
                f"The configuration is damaged ({error}). Restore it, or train again."
            ) from error
        _check_values(config)
        unset = [field for field, value in _flat(config.to_dict()).items() if value is None]
        if missing := needed.intersection(unset):
            raise InputError(f"config.{min(missing)} is not set. Restore it, or train again.")
        spec = spec_of(config)
        config.image_size = _size(config.image_size)
        config.layers = check_layers(spec, config.layers)
        method(config.detector).fill(config, spec)
    return config.lock()


def without(config: ConfigDict, fields: Sequence[str]) -> dict:
    """Returns the fields of a configuration by dotted name, without some fields and sections."""
    flat = _flat(to_plain(config))
    return {k: v for k, v in flat.items() if not any(f"{k}.".startswith(f"{f}.") for f in fields)}


def differences(saved: dict, config: ConfigDict) -> list[str]:
    """Returns a line per field in which the configuration of a run directory differs.

    Fields that none of its detectors reads are left out.
    """
    detectors = {each.detector for each in variants(config).values()}
    # Other fields that the run does not have are at their defaults.
    old, new = _flat(to_plain(default())) | _BEFORE | _flat(saved), _flat(to_plain(config))
    return [
        f"{name}: {old.get(name, 'unset')} in the run, {new.get(name, 'unset')} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _FREE_TO_CHANGE + _RETIRED
        if not _is_unread(name, detectors)
    ]


def misspelt(config: ConfigDict, arguments: list[str]) -> str | None:
    """Returns a message about the first `--config.<field>` that does not exist, or None."""
    fields = _flat(config.to_dict())
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0].removeprefix("config.")
        if argument.lstrip("-").startswith("config.") and name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Fields: {', '.join(fields)}."
            return f"--config.{name} is not a field of the configuration. {hint}"
    return None


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        nested = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{name}": value} if nested is None else nested
    return flat


def _nested(flat: dict) -> dict:
    """The inverse of `_flat`."""
    tree: dict = {}
    for name, value in flat.items():
        *sections, field = name.split(".")
        section = tree
        for each in sections:
            section = section.setdefault(each, {})
        section[field] = value
    return tree
