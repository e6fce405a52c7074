"""Configuration: the default fields, what depends on the backbone, and what a run folder keeps."""

import difflib
import math
import operator
from collections.abc import Sequence

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fastflow_jax.backbones import check_layers, find_spec
from fastflow_jax.data.transforms import MASK_RESIZES, RESIZES
from fastflow_jax.detectors.fastflow.model import NORMS
from fastflow_jax.detectors.registry import KINDS as DETECTORS
from fastflow_jax.detectors.registry import kind
from fastflow_jax.errors import InputError
from fastflow_jax.features.cache import CACHE_LOCATIONS
from fastflow_jax.features.extract import DTYPES
from fastflow_jax.files import expanded, to_plain
from fastflow_jax.flows.chain import is_double
from fastflow_jax.flows.coupling import half_channels
from fastflow_jax.parallel import KINDS


def default() -> ConfigDict:
    """The default recipe. Fields that are None are filled from the backbone by `fill`."""
    c = ConfigDict()
    c.seed = 0  # of the flow's weights, permutations and order, and of random backbones
    c.seeds = 1  # this many runs, from `seed` on; the table gives mean and deviation
    c.detector = "fastflow"  # see `detectors.registry.KINDS`
    c.parallel = "pmap"  # or "jit": how the devices of this machine share a batch

    # Data
    c.data = ConfigDict()
    c.data.name = "folder"  # or btad, cifar10, elpv, mvtec_ad, synthetic
    c.data.category = placeholder(str)  # of that data set
    c.data.root = placeholder(str)  # folder of images
    c.data.dir = placeholder(str)  # prepared tfds sets; unset: $TFDS_DATA_DIR, then tfds's default
    c.data.holdout = 0.1  # part of the normal training images kept from the flow, for calibration
    # Which normal images show the same part, and are held out together: "folder", a .csv file or a
    # regular expression, see `data.groups.labels_of`; unset: each image shows another part
    c.data.groups = placeholder(str)
    c.data.resize = "square"  # stretch to the input; "crop", "pad": see `transforms.placement`
    c.data.mask_resize = "nearest"  # or "floor", "threshold": see `transforms.resize_mask`

    # Test images tampered with, to see how robust a detector is; masks follow
    c.data.tamper = ConfigDict()
    c.data.tamper.rotate = 0.0  # degrees, counter-clockwise
    c.data.tamper.zoom = 1.0  # factor; above 1 the image grows
    c.data.tamper.down = 0.0  # moved by this part of the height
    c.data.tamper.right = 0.0  # and of the width

    # Training images changed at random, anew in every epoch: features are then not cached
    c.augment = ConfigDict()
    c.augment.flips = False  # left-right and upside-down, each in half of the cases
    c.augment.rotate = 0.0  # degrees at the most, either way
    c.augment.colour = 0.0  # brightness, contrast and saturation change by at most this part

    # What fields that are None become: the recipe's values, or those published for the backbone
    c.published = False

    # Backbone
    c.backbone = "tf_efficientnet_lite0"
    c.weights = placeholder(str)  # a file, a timm tag or "random"; unset: the known source
    c.image_size = placeholder(tuple)  # (height, width), or (side,)
    c.layers = placeholder(tuple)  # feature maps, one flow each; unset: the detector's choice,
    c.layers_as = placeholder(str)  # or that of this other detector
    c.length_power = 0.25  # of each feature vector's length, see `extract.compress`; 1: as it is
    c.feature_dtype = "float16"  # that features are rounded to; or "bfloat16", "float32"
    c.batch_size = placeholder(int)  # images whose features or scores are computed at a time

    # Flow
    c.flow = ConfigDict()
    c.flow.norm = placeholder(str)  # "whiten", "standardise", "layer", "layer_plain" or "none"
    c.flow.steps = placeholder(int)
    c.flow.kernels = placeholder(tuple)  # taken in turn: (3,) or (3, 1)
    c.flow.out_kernel = 1  # side of a subnet's last kernel; 0: as its first, the reference's
    c.flow.hidden_ratio = placeholder(float)  # hidden channels of a subnet over its input's
    c.flow.clamp = 2.0  # bound of a coupling's log-scale
    c.flow.coupling = "single"  # or "double"
    c.flow.affine = "exp"  # form of the learned scale; "softplus": the reference's
    c.flow.zero_init = True  # a fresh flow is the identity but for shuffles; False: the reference's
    c.flow.dtype = "float32"  # that its convolutions compute in; "bfloat16" suits GPUs and TPUs
    c.flow.reversible = False  # a fifth of the memory at 20 steps for a third more computation

    # CFLOW, see `detectors.cflow`
    c.cflow = ConfigDict()
    c.cflow.steps = 8  # of each scale's flow
    c.cflow.clamp = 1.9  # bound of a coupling's log-scale
    c.cflow.encoding = 128  # numbers that tell the flow of a position, a multiple of 4
    c.cflow.fiber = 256  # locations of each scale that a training step draws from its images

    # VAE, see `detectors.vae`
    c.vae = ConfigDict()
    c.vae.width = 16  # channels of the first convolution; each next one has twice as many
    c.vae.latent = 64  # numbers in the code of an image
    c.vae.samples = 8  # codes that an image is scored by

    # GANomaly, see `detectors.gan`
    c.gan = ConfigDict()
    c.gan.width = 16  # as above
    c.gan.latent = 100  # as above
    c.gan.adversarial = 1.0  # weights of the generator's three losses
    c.gan.contextual = 50.0
    c.gan.encoder = 1.0

    # Training
    c.train = ConfigDict()
    c.train.steps = 500  # rounded to whole epochs
    c.train.max_epochs = 10  # few images take fewer steps: more would learn them by heart
    c.train.epochs = placeholder(int)  # overrides both
    c.train.batch_size = 8
    c.train.window = 16  # places a side of each map that a step sees, drawn anew; 0: all
    c.train.drop_last = False  # leave an epoch's short last batch out, as the reference does
    c.train.loss = "per_dimension"  # or "sum": the reference's
    c.train.optimizer = "adam"  # or "sgd"
    c.train.beta2 = 0.99  # Adam's memory of squared gradients; short runs want a short one
    c.train.learning_rate = 3e-3
    c.train.schedule = "cosine"  # to zero; or "constant"
    c.train.warmup = 0.1  # part of all steps over which the rate rises from zero
    c.train.weight_decay = 0.0  # L2 inside the optimiser, as torch's Adam has it
    c.train.clip = 1.0  # bound of the gradient's global norm; 0: none
    c.train.seeds_at_once = placeholder(int)  # in one program; unset: all on GPU or TPU
    c.train.cache = "auto"  # location of cached features, see `features.cache.CACHE_LOCATIONS`

    # From likelihood to map to score
    c.map = ConfigDict()
    c.map.form = "log"  # or "probability": the reference's
    c.map.log_det = 0.1  # weight of the log-determinant: 1 in a likelihood, 0 in the reference
    c.map.standardise = True  # scales in units of their spread over held-out normal images
    c.map.compress = True  # what lies far out counts for less, see `fastflow.scorer.fuse`
    c.map.bank = 4000  # normal latents that z is compared with, see `bank`; 0: none
    c.map.sigma = 4.0  # of the blur, as PatchCore and SPADE have it too: see `model.resize_map`
    c.score = ConfigDict()
    c.score.form = "windows"  # see `model.window_maxima`; or "top_k"
    c.score.top_k = 0.0  # mean of this part of the map's pixels; 0: the maximum

    # Of an ablation: what each of its runs has otherwise, by a name that its row is to have
    c.variants = ConfigDict()

    # PatchCore, see `detectors.patchcore`
    c.patchcore = ConfigDict()
    c.patchcore.dimension = 1024  # of a patch's feature
    c.patchcore.projection = 128  # dimensions in which the coreset is chosen
    c.patchcore.coreset = 0.1  # part of all patches that the memory bank keeps
    c.patchcore.max_points = 10_000  # and how many at the most, for the sake of time
    c.patchcore.neighbours = 1  # whose mean distance is a patch's score
    c.patchcore.reweight = 0  # neighbours that re-weight an image's score; the paper: 9; 0: none

    # SPADE, see `detectors.spade`
    c.spade = ConfigDict()
    c.spade.images = 5  # nearest training images, as the reference has it; the paper: 50
    c.spade.kappa = 1  # nearest pixels of those, whose mean distance is a pixel's score

    # What a run writes
    c.checkpoint_every = 1  # epochs
    c.evaluate_every = 0  # epochs; 0: at the end only. Fills "best_on_test", for study
    c.heatmaps = 40  # pictures at the most
    c.report = True  # report.html, see report/html.py
    c.report_pictures = 2000  # in it at the most; those of several parts share that number
    return c


def name_data(config: ConfigDict, argument: str) -> None:
    """Set the data set and its category from <data set>[/<category>]; what is not named stays."""
    name, _, category = argument.partition("/")
    config.data.name = name or config.data.name
    config.data.category = category or config.data.category


# Of all images of a batch, 32 of 256x256: some 200 bytes each in EfficientNet-Lite0, and on a CPU
# larger batches are no faster.
_PIXELS_AT_A_TIME = 2**21

# What may differ between a run and its continuation.
_FREE_TO_CHANGE = (
    *("parallel", "heatmaps", "report", "report_pictures"),
    *("batch_size", "data.dir", "flow.reversible", "train.cache", "train.seeds_at_once"),
)

# Fields of earlier versions that changed no result; run directories may have them.
_RETIRED = ("measure_speed",)

# What all variants of a run share.
_OF_THE_WHOLE = (
    *("data.name", "data.category", "data.root", "data.dir"),
    *("seed", "seeds", "report", "report_pictures"),
)

# Lowest and highest values of numbers.
_BOUNDS = {
    "seed": (0, 2**31),
    "seeds": (1, 1000),
    "data.holdout": (0, 0.5),
    "data.tamper.rotate": (-180, 180),
    "data.tamper.zoom": (0.1, 10),
    "data.tamper.down": (-1, 1),
    "data.tamper.right": (-1, 1),
    "augment.rotate": (0, 180),
    "augment.colour": (0, 1),
    "length_power": (0, 1),
    "batch_size": (1, 10**6),
    "flow.steps": (1, 1000),
    "flow.hidden_ratio": (1e-3, 100),
    "flow.clamp": (1e-3, 100),
    "cflow.steps": (1, 1000),
    "cflow.clamp": (1e-3, 100),
    "cflow.encoding": (4, 10**6),
    "cflow.fiber": (1, 10**9),
    "vae.width": (1, 10**4),
    "vae.latent": (1, 10**6),
    "vae.samples": (1, 10**4),
    "gan.width": (1, 10**4),
    "gan.latent": (1, 10**6),
    "gan.adversarial": (0, 1e6),
    "gan.contextual": (0, 1e6),
    "gan.encoder": (0, 1e6),
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
    "map.log_det": (0, 1),
    "map.bank": (0, 10**7),
    "map.sigma": (0, 100),
    "score.top_k": (0, 1),
    "patchcore.dimension": (1, 10**5),
    "patchcore.projection": (1, 10**5),
    "patchcore.coreset": (1e-9, 1),
    "patchcore.max_points": (1, 10**9),
    "patchcore.neighbours": (1, 1000),
    "patchcore.reweight": (0, 1000),
    "spade.images": (1, 10**6),
    "spade.kappa": (1, 1000),
    "checkpoint_every": (1, 10**9),
    "evaluate_every": (0, 10**9),
    "heatmaps": (0, 10**6),
    "report_pictures": (0, 10**6),
}


def fill(config: ConfigDict) -> ConfigDict:
    """A copy with every field that depends on the backbone set, and all values checked.

    Of each variant all that it has otherwise is written out: of one with another backbone, that
    backbone's input size and maps too.

    Raises:
      InputError: a value that no run can have, named with what is possible.
    """
    config = config.copy_and_resolve_references()
    c = _fill(config)
    plain = _flat(c.to_dict())
    c.unlock()
    for name in _names_of_variants(config):
        changes = config.variants[name]
        unknown = _flat(changes.to_dict()).keys() - plain.keys()
        if unknown:
            raise InputError(f"config.variants.{name}: there is no field {min(unknown)}")
        if shared := _flat(changes.to_dict()).keys() & set(_OF_THE_WHOLE):
            raise InputError(
                f"config.variants.{name}: all variants share one {min(shared)}; make it a run of "
                "its own"
            )
        filled = _flat(_fill(_changed(config, changes)).to_dict())
        c.variants[name] = ConfigDict(
            _nested({field: v for field, v in filled.items() if v != plain.get(field)})
        )
    return c.lock()


def variants(config: ConfigDict) -> dict[str | None, ConfigDict]:
    """The configuration of each run of an ablation by its name; else the one, under None."""
    names = _names_of_variants(config)
    return {name: _changed(config, config.variants[name]) for name in names} or {None: config}


def _names_of_variants(config: ConfigDict) -> list[str]:
    """In their order; a ConfigDict itself gives fields in that of the alphabet."""
    return list(to_plain(config)["variants"])


def _changed(config: ConfigDict, changes: ConfigDict) -> ConfigDict:
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.variants = ConfigDict()
        c.update(changes)
    return c


def _fill(config: ConfigDict) -> ConfigDict:
    """See `fill`; variants stay as they are."""
    c = config.copy_and_resolve_references()
    c.unlock()
    spec = find_spec(c.backbone)
    c.image_size = _size(c.image_size or spec.image_size)
    if c.batch_size is None:
        c.batch_size = max(1, min(32, _PIXELS_AT_A_TIME // math.prod(c.image_size)))
    _one_of("detector", c.detector, DETECTORS)
    _one_of("layers_as", c.layers_as or c.detector, DETECTORS)
    layers_of = getattr(kind(c.layers_as or c.detector), "layers", None)
    if layers_of is None:
        layers_of = operator.attrgetter("layers") if c.published else _recipe_layers
    c.layers = check_layers(spec, c.layers or layers_of(spec))
    flow = spec.flow if c.published else _recipe_flow(spec, c.layers)
    for field, value in flow.items():
        if c.flow[field] is None:
            c.flow[field] = value
    _one_of("flow.norm", c.flow.norm, NORMS)
    _one_of("flow.affine", c.flow.affine, ("exp", "softplus"))
    _one_of("flow.coupling", c.flow.coupling, ("single", "double"))
    _one_of("flow.dtype", c.flow.dtype, ("float32", "bfloat16"))
    _one_of("train.loss", c.train.loss, ("per_dimension", "sum"))
    _one_of("train.optimizer", c.train.optimizer, ("adam", "sgd"))
    _one_of("train.cache", c.train.cache, CACHE_LOCATIONS)
    _one_of("feature_dtype", c.feature_dtype, DTYPES)
    _one_of("train.schedule", c.train.schedule, ("cosine", "constant"))
    _one_of("map.form", c.map.form, ("log", "probability"))
    _one_of("score.form", c.score.form, ("windows", "top_k"))
    _one_of("parallel", c.parallel, KINDS)
    _one_of("data.resize", c.data.resize, RESIZES)
    _one_of("data.mask_resize", c.data.mask_resize, MASK_RESIZES)
    if not c.flow.kernels or not all(k in (1, 3, 5, 7) for k in c.flow.kernels):
        raise InputError(f"config.flow.kernels are of 1, 3, 5 and 7, not {c.flow.kernels}")
    if c.flow.out_kernel not in (0, 1, 3, 5, 7):
        raise InputError(f"config.flow.out_kernel is 0, 1, 3, 5 or 7, not {c.flow.out_kernel}")
    if c.patchcore.reweight == 1:
        raise InputError("config.patchcore.reweight is 0 or above 1: alone, a neighbour weighs 0")
    if c.cflow.encoding % 4:
        raise InputError(f"config.cflow.encoding is a multiple of 4, not {c.cflow.encoding}")
    values = _flat(c.to_dict())
    for field, (low, high) in _BOUNDS.items():
        if values[field] is not None and not low <= values[field] <= high:
            raise InputError(f"config.{field} is from {low} to {high}, not {values[field]}")
    channels = min(spec.maps[layer][0] for layer in c.layers)
    passive, _ = half_channels(channels, swap=is_double(c.flow.coupling))
    if c.detector == "fastflow" and passive * c.flow.hidden_ratio < 1:
        raise InputError(
            f"config.flow.hidden_ratio is at least 1/{passive} with {', '.join(c.layers)}, not "
            f"{c.flow.hidden_ratio}: a subnet needs a hidden channel"
        )
    if c.data.root is not None:
        c.data.root = str(expanded(c.data.root).resolve())
    if c.data.dir is not None:
        expanded(c.data.dir)  # raises for a URL, before anything is written
    if c.weights is not None and expanded(c.weights).is_file():
        c.weights = str(expanded(c.weights).resolve())
    return c.lock()


def _recipe_flow(spec, layers: tuple[str, ...]) -> dict:
    """Four steps on whitened features, their subnets as wide as a step's time allows.

    A convolution's work grows with its channels in and out: where the widest map has more than
    EfficientNet-Lite0's 192, hidden channels are fewer by as much, down to the paper's 0.16.
    """
    widest = max(spec.maps[layer][0] for layer in layers)
    ratio = 2.0 * min(1.0, 192 / widest) ** 2
    return {"norm": "whiten", "steps": 4, "kernels": (3,), "hidden_ratio": max(ratio, 0.16)}


def _recipe_layers(spec) -> tuple[str, ...]:
    """The deepest map of stride 8, the two deepest of 16 and the first of 32, as far as there are.

    The first says where, the last what. Where a backbone has one stride alone, as transformers do,
    the published cut and the block before it.
    """

    def of(stride):
        return [name for name, (_, s) in spec.maps.items() if s == stride]

    if of(16) and of(32):
        return (*of(8)[-1:], *of(16)[-2:], of(32)[0])
    names = list(spec.maps)
    end = names.index(spec.layers[0]) + 1
    return tuple(names[max(0, end - 2) : end])


def _one_of(field: str, value: str, choices) -> None:
    if value not in choices:
        raise InputError(f"config.{field} is one of {', '.join(choices)}, not {value!r}")


def _size(size) -> tuple[int, int]:
    """(side,) or (height, width) -> (height, width)."""
    if not all(isinstance(side, int) and side > 0 for side in size) or len(size) not in (1, 2):
        raise InputError(f"config.image_size is a side or '(height, width)', not {tuple(size)}")
    return (size[0], size[-1])


def from_plain(plain: dict) -> ConfigDict:
    """What `to_plain` was given: the filled configuration that a run folder keeps.

    Raises:
      InputError: it has other fields than there are now, as those of other versions may.
    """

    def with_tuples(section):
        return {
            k: with_tuples(v) if isinstance(v, dict) else tuple(v) if isinstance(v, list) else v
            for k, v in section.items()
        }

    config = default()
    plain = {name: value for name, value in plain.items() if name not in _RETIRED}
    unknown = _flat(plain).keys() - _flat(config.to_dict()).keys()
    unknown = [name for name in sorted(unknown) if not name.startswith("variants.")]
    if unknown:
        raise InputError(f"a configuration of another version: there is no field {unknown[0]}")
    with config.unlocked():
        config.update(with_tuples(plain))
    return config.lock()


def without(config: ConfigDict, fields: Sequence[str]) -> dict:
    """All fields of a configuration but these and, where one is a section, those in it."""
    flat = _flat(to_plain(config))
    return {k: v for k, v in flat.items() if not any(f"{k}.".startswith(f"{f}.") for f in fields)}


def differences(saved: dict, config: ConfigDict) -> list[str]:
    """A line for each field in which a run folder's configuration differs from this one."""
    # A field that the run does not have yet had no effect: it counts as the default.
    old, new = _flat(to_plain(default())) | _flat(saved), _flat(to_plain(config))
    return [
        f"{name}: {old.get(name, 'unset')} there, {new.get(name, 'unset')} asked for"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _FREE_TO_CHANGE + _RETIRED
    ]


def misspelt(config: ConfigDict, arguments: list[str]) -> str | None:
    """What is wrong with the first `--config.<field>` that does not exist, with near names."""
    fields = _flat(config.to_dict())
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0].removeprefix("config.")
        if argument.lstrip("-").startswith("config.") and name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"fields: {', '.join(fields)}"
            return f"--config.{name} is no field of the configuration; {hint}"
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
