"""Every configuration file, run on tiny copies of its data sets."""

import csv
import json
import types

import numpy as np
import pytest
from PIL import Image
from test_config import CONFIGS, load

from fastflow_jax import data
from fastflow_jax.backbones import find_spec
from fastflow_jax.config import fill, variants, without
from fastflow_jax.data.tfds import btad, cifar10, mvtec_ad, mvtec_loco
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.evaluate import METRICS
from fastflow_jax.report.table import format_table
from fastflow_jax.runs import experiment

TRAIN, GOOD, BAD = 4, 2, 2  # images of a category


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    for module in (mvtec_ad, btad):
        counts = dict.fromkeys(module.CATEGORIES, (TRAIN, GOOD + BAD))
        monkeypatch.setattr(module, "COUNTS", counts)
    monkeypatch.setattr(cifar10, "COUNTS", (50, 10))


RNG = np.random.default_rng(0)


def photograph(path, size=(36, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8)).save(path)


def make_category(
    root,
    good="good",
    bad="crack",
    suffix="_mask",
    extension=".png",
    masks=".png",
    levels=(255,) * BAD,
):
    for i in range(TRAIN):
        photograph(root / f"train/{good}/{i:03}{extension}")
    for i in range(GOOD):
        photograph(root / f"test/{good}/{i:03}{extension}")
    for i in range(BAD):
        photograph(root / f"test/{bad}/{i:03}{extension}")
        mask = np.zeros((36, 30), np.uint8)
        mask[5:20, 4 + i : 22] = levels[i]
        path = root / f"ground_truth/{bad}/{i:03}{suffix}{masks}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)


def mvtec_tree(raw):
    for category in ("bottle", "screw"):
        make_category(raw / "mvtec_ad/mvtec_anomaly_detection" / category)
    return ["bottle", "screw"]


def btad_tree(raw):
    extensions = {"01": (".bmp", ".png"), "02": (".png", ".png"), "03": (".bmp", ".bmp")}
    for category, (extension, masks) in extensions.items():
        folder = raw / "btad/BTech_Dataset_transformed" / category
        make_category(folder, "ok", "ko", "", extension, masks)
    return list(btad.CATEGORIES)


def cifar10_files(raw):
    folder = raw / "cifar10/cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows = RNG.integers(0, 256, (10, 3073), np.uint8)
        rows[:, 0] = range(10)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    return ["bird", "ship"]


def elpv_folder(root):
    lines = []
    for i, probability in enumerate([0.0] * 5 + [0.3333333333333333] + [1.0] * 2):
        photograph(root / f"images/cell{i:04}.png")
        lines.append(f"images/cell{i:04}.png  {probability}   mono")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")


def tiny(config, **fields):
    """The configuration with a small backbone, small images and a short training."""
    config.weights, config.image_size, config.layers = "random", (32,), ("blocks.2",)
    config.backbone, config.batch_size, config.heatmaps = "tf_efficientnet_lite0", 4, 1
    config.detector = config.detector.replace("auto", "fastflow")  # there are few images
    detectors = {each.detector for each in variants(config).values()}
    if "fastflow" in detectors:
        config.flow.steps, config.flow.kernels, config.flow.hidden_ratio = 1, (3,), 0.5
        config.map.bank = min(config.map.bank, 20)
    if detectors & {"fastflow", "cflow", "vae", "gan"}:
        config.train.epochs, config.train.batch_size = 1, 4
    config.update_from_flattened_dict(fields)
    return fill(config)


@pytest.fixture
def run_config(tmp_path, capsys, caplog):
    """run(name, argument, **fields) -> results, table with bars and messages, run directory.

    `named` selects variants of an ablation.
    """

    def run(name, argument=None, workdir="run", named=(), **fields):
        caplog.set_level("INFO")
        workdir = tmp_path / workdir
        fields = {"data.dir": str(tmp_path / "data")} | fields
        config = load(name, *filter(None, [argument]))
        for variant in set(config.variants).difference(named) if named else ():
            del config.variants[variant]
        results = experiment.run(tiny(config, **fields), workdir)
        shown = capsys.readouterr().err + caplog.text
        return results, types.SimpleNamespace(out=format_table(results), err=shown), workdir

    return run


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "data/downloads/manual"


def first_words(printed):
    return [line.split()[0] for line in printed.out.splitlines() if line.split()]


@pytest.mark.parametrize(
    ("name", "make", "argument"),
    [
        ("mvtec", mvtec_tree, "bottle,screw"),
        ("reference", mvtec_tree, "bottle,screw"),
        ("btad", btad_tree, None),
        ("cifar10", cifar10_files, "bird,ship"),
    ],
)
def test_a_benchmark_in_miniature(name, make, argument, raw, run_config):
    categories = make(raw)
    results, printed, folder = run_config(name, argument)
    assert list(results["categories"]) == categories
    assert f"run: 100%|██████████| {len(categories)}/{len(categories)} [" in printed.err
    rows = first_words(printed)
    assert [row for row in rows if row in (*categories, "mean")] == [*categories, "mean"]
    for category in categories:
        assert (folder / category / "part.json").is_file()
        assert len(list((folder / category / "heatmaps").glob("*/*.png"))) == 1
    assert json.loads((folder / "results.json").read_text()) == results
    with (folder / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [*categories, "mean"]
    assert float(table[-1]["image AUROC"]) == pytest.approx(
        results["mean"]["image_auroc"], abs=1e-4
    )
    assert (folder / "table.md").read_text().count("\n| ") == len(categories) + 2
    has_masks = name != "cifar10"
    of_masks = [m for m in METRICS if not m.startswith("image")]
    without_held_out = ["seg_f1"] if name == "reference" else []
    assert missing(results) == ([*without_held_out, "spro_05"] if has_masks else of_masks)


def missing(results):
    """Metrics without a value; sPRO needs regions with saturation thresholds."""
    return [metric for metric in METRICS if results["mean"][metric] is None]


# Configurations of data sets that tests/data/tfds/test_manual_sets.py reads in miniature: the
# argument and the expected data set and category.
SETS = {
    "aebad": ("view", "aebad", "view"),
    "dagm": ("Class1", "dagm", "Class1"),
    "kolektor_sdd": ("kolektor_sdd", "kolektor_sdd", None),
    "mpdd": ("tubes", "mpdd", "tubes"),
    "mvtec_ad_2": ("can", "mvtec_ad_2", "can"),
    "mvtec_loco": ("pushpins,screw_bag", "mvtec_loco", "pushpins,screw_bag"),
    "real_iad": ("usb", "real_iad", "usb"),
    "visa": ("candle", "visa", "candle"),
}


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_downloaded_manually(name):
    argument, *expected = SETS[name]
    chosen = fill(load(name, argument)).data
    assert [chosen.name, chosen.category] == expected
    assert data.categories(chosen) == (
        tuple(chosen.category.split(",")) if expected[1] else (None,)
    )
    everything = fill(load(name)).data
    assert everything.category is None
    assert len(data.categories(everything)) > 1 or name == "kolektor_sdd"


def test_fastflow_on_a_named_set():
    assert load("fastflow", "elpv/poly").to_dict() == load("demo", "poly").to_dict()
    for _, *expected in SETS.values():
        chosen = load("fastflow", "/".join(filter(None, expected))).data
        assert [chosen.name, chosen.category] == expected


def test_regions_of_loco_reach_the_run(raw, run_config, monkeypatch):
    """Calibration images, two kinds of defects and several masks of an image in one run."""
    monkeypatch.setattr(mvtec_loco, "COUNTS", {"pushpins": (TRAIN, 2 * BAD + GOOD)})
    folder = raw / "mvtec_loco/pushpins"
    for kind in ("logical_anomalies", "structural_anomalies"):
        make_category(folder, bad=kind, suffix="", levels=(1, 2))
        for mask in sorted((folder / "ground_truth" / kind).glob("*.png")):
            mask.with_suffix("").mkdir()
            mask.rename(mask.with_suffix("") / "000.png")
    for i in range(4):
        photograph(folder / f"validation/good/{i:03}.png")
    kinds = [
        {"pixel_value": level, "saturation_threshold": 20, "relative_saturation": False}
        for level in (1, 2)
    ]
    (folder / "defects_config.json").write_text(json.dumps(kinds))
    results, _, _ = run_config("mvtec_loco", "pushpins")
    assert results["protocol"]["data"]["pushpins"]["calibration_images"] == 4
    assert None not in results["mean"].values()


def test_a_table_is_reproduced_bit_for_bit(raw, run_config):
    btad_tree(raw)
    fields = {"seeds": 2, "data.category": "03"}
    first, _, one = run_config("btad", workdir="one", **fields)
    again, _, two = run_config("btad", workdir="two", **fields)
    for key in ("categories", "mean", "std", "seeds"):
        assert again[key] == first[key]
    for name in ("table.md", "table.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_demo_and_folder(tmp_path, run_config):
    elpv_folder(tmp_path / "elpv")
    results, _, _ = run_config("demo", **{"data.root": str(tmp_path / "elpv")})
    assert results["mean"]["image_auroc"] is not None
    make_category(tmp_path / "screws", extension=".jpg")
    for resize in ("crop", "pad"):
        fields = {"data.root": str(tmp_path / "screws"), "data.resize": resize}
        results, _, _ = run_config("folder", workdir=resize, **fields)
        assert missing(results) == ["spro_05"]
        assert results["protocol"]["resize"] == resize


def test_a_list_of_images(tmp_path, run_config):
    make_category(tmp_path / "screws")
    rows = ["path,split,label,mask"]
    for path in sorted((tmp_path / "screws").glob("t*/*/*.png")):
        split, label = path.parts[-3:-1]
        mask = f"ground_truth/crack/{path.stem}_mask.png" if label == "crack" else ""
        rows.append(f"{split}/{label}/{path.name},{split},{label},{mask}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    fields = {"data.manifest": str(tmp_path / "list.csv"), "data.root": str(tmp_path / "screws")}
    results, _, _ = run_config("folder", **fields)
    assert missing(results) == ["spro_05"]
    same, _, _ = run_config("folder", workdir="same", **{"data.root": fields["data.root"]})
    assert same["mean"] == pytest.approx(results["mean"])


def test_synthetic(run_config):
    pytest.importorskip("skimage", reason="the textures come with scikit-image")
    results, _, _ = run_config("synthetic", "gravel", **{"data.mask_resize": "floor"})
    assert results["protocol"]["masks"] == "resized to the input size, floor"


@pytest.fixture
def screws(tmp_path):
    make_category(tmp_path / "screws")
    return {"data.root": str(tmp_path / "screws"), "heatmaps": 0}


def test_tampered_test_images_are_scored_by_one_training(screws, run_config):
    results, printed, folder = run_config("ablations", "tampered/folder", **screws)
    rows = list(results["variants"])
    assert rows[:2] == ["untouched", "rotate_5"]
    assert [word for word in first_words(printed) if word in rows] == rows
    assert [path.parent.name for path in folder.rglob("checkpoints")] == ["untouched"]
    figures = [each["mean"]["pixel_ap"] for each in results["variants"].values()]
    assert len(set(figures)) == len(figures)
    assert results["categories"] == results["variants"]["untouched"]["categories"]
    assert results["variants"]["rotate_5"]["changes"] == {"data": {"tamper": {"rotate": 5.0}}}

    plain, _, _ = run_config("folder", workdir="plain", **screws)
    assert plain["mean"] == results["mean"]
    alone, _, _ = run_config("folder", workdir="alone", **screws, **{"data.tamper.rotate": 5.0})
    assert alone["mean"] == results["variants"]["rotate_5"]["mean"]


def test_an_ablation_goes_on_where_it_stopped(screws, run_config, killed_in_the_third_part):
    fields = screws | {"named": ("untouched", "rotate_5", "shift_5")}
    undisturbed, _, _ = run_config("ablations", "tampered/folder", workdir="one", **fields)
    with killed_in_the_third_part():
        run_config("ablations", "tampered/folder", workdir="two", **fields)
    resumed, _, _ = run_config("ablations", "tampered/folder", workdir="two", **fields)
    assert resumed["variants"] == undisturbed["variants"]


def test_kernels_of_a_small_and_a_large_backbone(screws, run_config):
    large = {"variants.large_3x3.backbone": "tf_efficientnet_lite1"}
    results, _, folder = run_config("ablations", "kernels/folder", **screws, **large)
    assert list(results["variants"]) == [
        "small_3x3",
        "small_3x3_1x1",
        "large_3x3",
        "large_3x3_1x1",
    ]
    weights = [
        json.loads((folder / name / "part.json").read_text())["weights"]
        for name in results["variants"]
    ]
    assert all(each["source"] == "random" for each in weights)
    assert len(list(folder.rglob("checkpoints"))) == 4
    changes = results["variants"]["large_3x3_1x1"]["changes"]
    assert changes["backbone"] == "tf_efficientnet_lite1", "one flag sets both rows"


@pytest.mark.parametrize("name", ["patchcore", "spade", "knn", "gaussian", "subspace"])
def test_a_detector_without_gradients(name, raw, run_config):
    categories = mvtec_tree(raw)
    fields = {"layers": ("blocks.1", "blocks.2")}
    results, _, folder = run_config(name, "mvtec_ad/bottle,screw", **fields)
    assert list(results["categories"]) == categories
    without_held_out = name in ("patchcore", "spade")
    assert missing(results) == (["seg_f1"] if without_held_out else []) + ["spro_05"]
    for each in results["protocol"]["data"].values():
        assert (each["held_out"] == 0) == without_held_out
    for category in categories:
        assert (folder / category / "part.json").is_file()
        assert len(list((folder / category / "heatmaps").glob("*/*.png"))) == 1
    again, printed, _ = run_config(name, "mvtec_ad/bottle,screw", **fields)
    assert again == results
    assert "is finished. To train on changed data" in printed.err


def test_augmented_trainings_differ_and_are_reproduced(screws, run_config):
    def losses(workdir, *named):
        fields = screws | {"workdir": workdir, "named": named}
        results, _, folder = run_config("ablations", "augmentation/folder", **fields)
        return {
            name: json.loads((folder / name / "metrics.jsonl").read_text())["loss"]
            for name in results["variants"]
        }

    first = losses("one")
    assert list(first) == ["none", "flips", "rotation", "colour", "all"]
    assert len(set(first.values())) == 5
    assert losses("two", "all") == {"all": first["all"]}


def test_copies_are_trained_once_for_upright_and_turned_test_images(screws, run_config):
    named = ("copies_0", "copies_4", "copies_4_rotate_5")
    results, _, folder = run_config("ablations", "copies/folder", named=named, **screws)
    assert list(results["variants"]) == list(named)
    trained = sorted(path.parent.name for path in folder.rglob("checkpoints"))
    assert trained == ["copies_0", "copies_4"]
    parts = [json.loads((folder / name / "part.json").read_text()) for name in named]
    counts = [(part["data"]["trained_on"], part["data"]["held_out"]) for part in parts]
    assert len(set(counts)) == 1, "copies are no further images"
    assert len({part["thresholds"]["image"]["n"] for part in parts}) == 1
    with np.load(folder / "copies_4/held_out.npz") as held_out:
        assert len(held_out["scores"]) == counts[0][1]


def test_the_ablation_of_steps_runs_each_number():
    changed = variants(fill(load("ablations", "steps/elpv/mono")))
    assert [c.flow.steps for c in changed.values()] == [1, 2, 4, 8, 16]
    assert {(c.data.name, c.data.category) for c in changed.values()} == {("elpv", "mono")}


def test_the_ablation_of_the_recipe_undoes_one_choice_at_a_time():
    changed = variants(fill(load("ablations", "recipe/elpv/mono")))
    recipe = without(changed.pop("default"), ())
    differing = {
        name: {field for field, value in without(c, ()).items() if value != recipe[field]}
        for name, c in changed.items()
    }
    assert differing.pop("published_maps") == {"published", "layers"}
    assert differing.pop("top_percent") == {"score.form", "score.top_k"}
    assert differing == {
        "standardise": {"flow.norm"},
        "norm_per_image": {"flow.norm"},
        "lengths_kept": {"length_power"},
        "published_kernels": {"flow.out_kernel"},
        "whole_maps": {"train.window"},
        "batches_of_32": {"train.steps", "train.batch_size"},
        "twenty_epochs": {"train.max_epochs"},
        "no_bank": {"map.bank"},
        "not_compressed": {"map.compress"},
        "border_in_full": {"map.border"},
        "equal_maps": {"map.feature_weight", "map.coarse_weight"},
        "z_alone": {"map.log_det"},
        "likelihood": {"map.log_det"},
        "maximum": {"score.form"},
    }


def test_an_unknown_ablation_is_named():
    with pytest.raises(
        InputError, match=r"no ablation 'kernel'\. Choose from kernels, augmentation"
    ):
        load("ablations", "kernel/elpv")


def test_cflow_on_a_data_set_and_on_a_folder(raw, screws, run_config):
    mvtec_tree(raw)
    fields = {"cflow.steps": 1, "cflow.encoding": 4, "heatmaps": 1}
    results, _, folder = run_config("cflow", "mvtec_ad/bottle", **fields)
    assert list(results["categories"]) == ["bottle"]
    assert missing(results) == ["spro_05"]
    assert len(list((folder / "heatmaps").rglob("*.png"))) == 1
    results, _, _ = run_config("cflow", "folder", workdir="folder", **screws | fields)
    assert missing(results) == ["spro_05"]


@pytest.mark.parametrize("name", ["vae", "gan"])
def test_pixels_of_cifar10(name, raw, run_config):
    cifar10_files(raw)
    fields = {"backbone": "pixels", "layers": ("image",), f"{name}.width": 2}
    results, _, _ = run_config(name, "cifar10/ship", **fields)
    assert list(results["categories"]) == ["ship"]
    assert results["mean"]["image_auroc"] is not None
    assert results["protocol"]["weights"] == {"source": "none needed"}


def test_detectors_side_by_side(screws, run_config):
    rows = ("fastflow", "patchcore")
    results, printed, folder = run_config("compare", "folder", named=rows, **screws)
    assert list(results["variants"]) == list(rows)
    for each in results["variants"].values():
        assert each["mean"]["aupro"] is not None
    head, *_ = csv.reader((folder / "table.csv").read_text().splitlines())
    assert head == ["name", "image AUROC", "pixel AUROC", "AUPRO", *head[4:]]
    assert [word for word in first_words(printed) if word in rows] == list(rows)
    again, printed, _ = run_config("compare", "folder", named=rows, **screws)
    assert again == results
    assert "finished" in printed.err


def test_compared_detectors_see_the_same_maps_and_their_own():
    runs = variants(fill(load("compare", "elpv/mono")))
    layers = {name: run.layers for name, run in runs.items()}
    assert len({maps for name, maps in layers.items() if "own" not in name}) == 1
    assert len(layers) == 10
    strides = {
        name: [find_spec(run.backbone).maps[layer][1] for layer in run.layers]
        for name, run in runs.items()
    }
    assert strides["patchcore_own_maps"] == [8, 16]
    assert strides["cflow_own_maps"] == [8, 16, 32]
    assert strides["spade_own_maps"] == [4, 8, 16, 32]
    learnt_from_pixels = variants(fill(load("compare", "cifar10")))
    assert [run.backbone for run in learnt_from_pixels.values()].count("pixels") == 2


def test_no_configuration_is_left_out():
    tested = {"ablations", "btad", "cifar10", "demo", "folder", "mvtec", "reference", "synthetic"}
    tested |= {"patchcore", "spade", "cflow", "vae", "gan", "knn", "gaussian", "subspace"}
    tested |= {"compare", "fastflow"} | SETS.keys()
    assert tested == {path.stem for path in CONFIGS}
