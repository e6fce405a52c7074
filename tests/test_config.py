"""Configurations: what is filled from the backbone, and what is refused."""

import ast
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from fastflow_jax.backbones import find_spec, spec_of
from fastflow_jax.config import default, differences, fill, from_plain, misspelt, variants, without
from fastflow_jax.detectors.base import recipe
from fastflow_jax.detectors.fastflow.scorer import flow_model
from fastflow_jax.errors import InputError
from fastflow_jax.files import to_plain
from fastflow_jax.runs.describe import describe

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def load(name, *arguments):
    path = next(path for path in CONFIGS if path.stem == name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_fills(path):
    filled = fill(load(path.stem))
    assert None not in (filled.image_size, filled.layers, *filled.flow.values())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_stored_configuration_is_read_back(path):
    filled = fill(load(path.stem))
    again = from_plain(json.loads(json.dumps(to_plain(filled))))
    assert again.to_dict() == filled.to_dict()
    assert again.image_size == filled.image_size  # a tuple, not a list
    assert {n: c.to_dict() for n, c in variants(again).items()} == {
        n: c.to_dict() for n, c in variants(filled).items()
    }


def test_a_configuration_of_another_version_is_named():
    plain = to_plain(fill(default()))
    plain["flow"]["depth"] = 3
    with pytest.raises(InputError, match=r"no field .flow\.depth"):
        from_plain(plain)


@pytest.mark.parametrize(
    ("backbone", "layers", "ratio"),
    [
        ("tf_efficientnet_lite0", ("blocks.2", "blocks.3", "blocks.4", "blocks.5"), 2.0),
        ("resnet18", ("layer2", "layer3", "layer4"), 0.28125),
        ("wide_resnet50_2", ("layer2", "layer3", "layer4"), 0.16),
        ("vit_small_patch14_dinov2", ("blocks.6", "blocks.7"), 0.5),
        ("cait_m48_448", ("blocks.39", "blocks.40"), 0.16),
    ],
)
def test_layers_and_hidden_ratio_follow_the_backbone(backbone, layers, ratio):
    c = default()
    c.backbone = backbone
    assert fill(c).layers == layers
    assert fill(c).flow.hidden_ratio == pytest.approx(ratio)  # narrow where maps are wide


@pytest.mark.parametrize(
    ("size", "at_a_time"), [((32,), 32), ((256,), 32), ((512,), 8), ((700, 1200), 2), ((9000,), 1)]
)
def test_the_batch_size_falls_with_the_image_size(size, at_a_time):
    c = default()
    c.image_size = size
    assert fill(c).batch_size == at_a_time
    c.batch_size = 5
    assert fill(c).batch_size == 5


def test_set_values_are_kept():
    c = default()
    c.layers = ("blocks.2",)
    c.image_size = (96,)
    c.flow.steps = 3
    filled = fill(c)
    assert (filled.layers, filled.image_size, filled.flow.steps) == (("blocks.2",), (96, 96), 3)
    assert c.flow.kernels is None  # a copy was filled


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("backbone", "resnet19", r"no backbone 'resnet19'\. Choose from resnet18"),
        ("layers", ("layer9",), r"no layer 'layer9'\. Choose from"),
        ("flow.norm", "batch", "config.flow.norm must be one of whiten, .*, not 'batch'"),
        ("map.form", "logit", "config.map.form must be one of log, probability, not 'logit'"),
        ("image_size", ("big",), "config.image_size must be .side"),
        ("image_size", (1, 2, 3), "config.image_size must be .side"),
        ("flow.affine", "linear", "config.flow.affine must be one of exp, softplus"),
        ("flow.kernels", (), "config.flow.kernels must be of 1, 3, 5 and 7"),
        ("flow.dtype", "float16", "config.flow.dtype must be one of float32, bfloat16"),
        ("flow.steps", 0, "config.flow.steps must be from 1 to 1000, not 0"),
        (
            "flow.hidden_ratio",
            0.01,
            r"config.flow.hidden_ratio must be at least 1/20 with .*, not 0.01",
        ),
        ("seeds", 0, "config.seeds must be from 1"),
        ("train.epochs", 0, "config.train.epochs must be from 1"),
        ("train.warmup", 1.0, "config.train.warmup must be from 0 to 0.9"),
        ("checkpoint_every", 0, "config.checkpoint_every must be from 1"),
        ("data.holdout", 0.7, "config.data.holdout must be from 0 to 0.5, not 0.7"),
        ("parallel", "pjit", "config.parallel must be one of pmap, jit"),
        ("data.resize", "stretch", "config.data.resize must be one of square, crop, pad"),
        (
            "data.mask_resize",
            "area",
            "config.data.mask_resize must be one of nearest, floor, threshold",
        ),
        ("data.tamper.zoom", 0.0, "config.data.tamper.zoom must be from 0.1 to 10"),
        ("patchcore.reweight", 1, "config.patchcore.reweight must be 0 or at least 2"),
        ("augment.colour", 2.0, "config.augment.colour must be from 0 to 1"),
        ("augment.copies", 65, "config.augment.copies must be from 0 to 64, not 65"),
        ("augment.copies", 4, r"config.augment.copies is 4, .*\. Set config.augment.rotate"),
    ],
)
def test_impossible_values_are_named(field, value, message):
    c = default()
    c.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=message):
        fill(c)


@pytest.mark.parametrize(
    ("detector", "field", "value"),
    [
        ("patchcore", "train.epochs", 3),
        ("spade", "map.bank", 0),
        ("cflow", "flow.steps", 2),
        ("vae", "train.window", 8),
        ("gan", "train.loss", "sum"),
        ("fastflow", "patchcore.neighbours", 3),
    ],
)
def test_a_changed_field_that_the_detector_does_not_read_is_refused(detector, field, value):
    c = default()
    c.update(recipe(detector))
    c.update_from_flattened_dict({field: value})
    with pytest.raises(
        InputError, match=rf"config\.{field} has no effect on {detector}\. Leave it"
    ):
        fill(c)


def test_a_variant_may_change_only_fields_that_its_detector_reads():
    fields = {"detector": "patchcore", "patchcore": {"neighbours": 3}}
    fill(with_variants(flow={}, patches=fields))
    with pytest.raises(
        InputError, match=r"variants\.patches\.score\.top_k has no effect on patchcore"
    ):
        fill(with_variants(flow={}, patches=fields | {"score": {"top_k": 0.1}}))
    c = with_variants(flow={}, patches=fields)
    c.score.top_k = 0.1  # of the run: one of its detectors reads it
    fill(c)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_filled_configuration_is_filled_to_itself(path):
    filled = fill(load(path.stem))
    assert to_plain(fill(filled)) == to_plain(filled)


def test_differences_skip_fields_that_change_no_result():
    one, two = fill(default()), default()
    two.seed, two.flow.clamp, two.parallel, two.heatmaps = 3, 1.5, "jit", 0
    lines = differences(to_plain(one), fill(two))
    assert lines == ["flow.clamp: 2.0 in the run, 1.5 now", "seed: 0 in the run, 3 now"]
    assert differences(to_plain(one), one) == []


@pytest.mark.parametrize("detector", ["fastflow", "knn", "patchcore"])
def test_runs_of_earlier_versions_weighted_borders_and_maps_equally(detector):
    config = default()
    config.update(recipe(detector))
    saved = to_plain(fill(config))
    for field in ("border", "feature_weight", "coarse_weight"):
        del saved["map"][field]
        assert from_plain(saved).map[field] == 1
    expected = {
        "fastflow": [
            "map.border: 1 in the run, 5 now",
            "map.coarse_weight: 1.0 in the run, 0.5 now",
            "map.feature_weight: 1.0 in the run, 2.0 now",
        ],
        "knn": ["map.border: 1 in the run, 5 now"],
        "patchcore": [],
    }
    assert differences(saved, fill(config)) == expected[detector]


def test_another_directory_of_images_is_a_difference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two, three = default(), default(), default()
    one.data.root, two.data.root, three.data.root = "a", str(tmp_path / "a"), "b"
    assert differences(to_plain(fill(one)), fill(two)) == []
    assert differences(to_plain(fill(one)), fill(three))[0].startswith("data.root: ")


def test_a_misspelt_field_is_named_with_similar_fields():
    message = misspelt(default(), ["main", "--config=x.py", "--config.train.epoch=3"])
    assert message.startswith("--config.train.epoch is not a field")
    assert "train.epochs" in message
    assert misspelt(default(), ["main", "--config.train.epochs=3"]) is None


# The trainable numbers of the published form, from its formula and the reference's log.
@pytest.mark.parametrize(
    ("backbone", "fields", "numbers"),
    [
        ("resnet18", {}, 5_574_912),
        ("wide_resnet50_2", {}, 45_007_872),
        ("deit_base_distilled_patch16_384", {}, 7_074_500),
        ("cait_m48_448", {}, 7_074_500),
        ("cait_m48_448", {"flow.hidden_ratio": 1 / 3}, 14_794_240),
    ],
)
def test_reference_has_the_published_number_of_parameters(backbone, fields, numbers):
    c = load("reference", "bottle")
    c.backbone = backbone
    c.update_from_flattened_dict(fields)
    c = fill(c)
    height, width = c.image_size
    maps = [find_spec(backbone).maps[layer] for layer in c.layers]
    shapes = [(1, height // stride, width // stride, channels) for channels, stride in maps]
    features = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    params = jax.eval_shape(flow_model(c).init, jax.random.key(0), features)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == numbers


def test_flow_fields_reach_the_model():
    c = default()
    c.flow.dtype, c.flow.reversible = "bfloat16", True
    model = flow_model(fill(c))
    assert model.flow.dtype == jnp.bfloat16
    assert model.flow.reversible
    assert (model.flow.kernels, model.flow.out_kernel) == ((3,), 1)
    plain = flow_model(fill(default()))
    assert plain.flow.dtype == jnp.float32
    assert not plain.flow.reversible


def test_describe_prints_scales_numbers_operations_and_memory():
    c = load("reference", "bottle")
    c.train.batch_size = 1
    text = " ".join(describe(fill(c)).split())
    assert "trainable parameters 5,574,912" in text
    assert "layer1 64x64x64 4 " in text
    assert "operations per image, backbone " in text
    assert "training step, batch of 1 " in text


def test_describe_states_the_licence_of_the_weights():
    c = default()
    c.backbone, c.weights, c.flow.steps = "convnext_tiny", "dinov3_lvd1689m", 1
    c.image_size = (64,)
    assert "licence of the weights DINOv3 License of Meta" in " ".join(describe(fill(c)).split())


def test_images_are_normalised_as_the_weights_expect():
    c = default()
    c.backbone = "vit_small_patch16_224"
    assert spec_of(fill(c)).mean == (0.5, 0.5, 0.5)
    c.weights = "dino"  # the only ones of this backbone that are for ImageNet's mean
    filled = fill(c)
    assert filled.mean == spec_of(filled).mean == (0.485, 0.456, 0.406)
    assert spec_of(from_plain(to_plain(filled))).std == (0.229, 0.224, 0.225)
    c.mean, c.std = (0.1,) * 3, (0.2,) * 3
    assert spec_of(fill(c)).mean == (0.1, 0.1, 0.1)


def test_describe_counts_the_banks():
    c = default()
    c.image_size, c.flow.steps, c.map.bank = (64,), 1, 5000
    text = " ".join(describe(fill(c)).split())
    # Two banks for maps of 8x8x40, 4x4x80, 4x4x112 and 2x2x192.
    assert f"operations per image, banks {4 * 5000 * 6400 / 1e9:.2f} G" in text
    assert f"banks (about) {4 * 5000 * 424 / 2**20:.1f} MiB in float16" in text


def with_variants(**changes):
    c = default()
    c.variants = ConfigDict(changes)
    return c


def test_a_variant_is_filled_as_a_separate_run():
    c = with_variants(second={}, first={"backbone": "resnet18", "flow": {"steps": 7}})
    filled = fill(c)
    assert list(variants(filled)) == ["second", "first"]  # in the order given
    alone = default()
    alone.backbone, alone.flow.steps = "resnet18", 7
    for name, expected in (("first", fill(alone)), ("second", fill(default()))):
        assert differences(to_plain(variants(filled)[name]), expected) == []
    assert filled.variants.first.layers == ("layer2", "layer3", "layer4")
    assert differences(to_plain(fill(filled)), filled) == []
    assert variants(fill(default())) == {None: fill(default())}


def test_set_values_apply_to_all_variants():
    c = with_variants(first={"backbone": "resnet18"})
    c.image_size, c.train.steps = (64,), 10
    changed = variants(fill(c))["first"]
    assert (changed.image_size, changed.train.steps) == ((64, 64), 10)


def test_impossible_variants_are_named():
    with pytest.raises(InputError, match=r"variants\.first has no field flow\.step"):
        fill(with_variants(first={"flow": {"step": 3}}))
    with pytest.raises(InputError, match=r"config\.flow\.steps must be from 1 to 1000"):
        fill(with_variants(first={"flow": {"steps": 0}}))
    for shared in ({"seed": 7}, {"data": {"root": "elsewhere"}}):
        with pytest.raises(InputError, match=r"variants\.first changes"):
            fill(with_variants(first=shared))


def test_another_value_of_a_variant_is_a_difference():
    one, two = (fill(with_variants(first={"flow": {"steps": n}})) for n in (2, 3))
    assert differences(to_plain(one), two) == ["variants.first.flow.steps: 2 in the run, 3 now"]


def test_without_removes_fields_and_sections():
    flat = without(fill(default()), ("data.tamper", "seed", "map"))
    assert "data.name" in flat
    assert "seeds" in flat
    assert not [name for name in flat if name.split(".")[0] in ("seed", "map")]
    assert not [name for name in flat if name.startswith("data.tamper")]


def test_describe_refuses_other_detectors():
    c = default()
    c.detector = "patchcore"
    with pytest.raises(InputError, match="Only fastflow can be described, not patchcore"):
        describe(fill(c))


def test_the_reference_describes_every_field(monkeypatch):
    monkeypatch.syspath_prepend(CONFIGS[0].parent.parent / "docs")
    import config_fields

    rows = [row for table in config_fields.rows().values() for row in table]
    described = {name: ast.literal_eval(value) for name, value, text in rows if text}
    c = default()
    values = {
        name: each
        for name, each in c.items()
        if not isinstance(each, ConfigDict) or name == "variants"
    }
    sections = {name: each for name, each in c.items() if name not in values}
    while sections:
        prefix, section = sections.popitem()
        for name, each in section.items():
            (sections if isinstance(each, ConfigDict) else values)[f"{prefix}.{name}"] = each
    values["variants"] = values["variants"].to_dict()
    assert len(rows) == len(described)
    assert described == values
