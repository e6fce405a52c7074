"""Data sets to download manually, on miniature trees with the official names and layouts."""

import csv
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflow_jax.data import categories, open_dataset
from fastflow_jax.data.tfds import (
    dagm,
    kolektor_sdd,
    mpdd,
    mvtec_ad_2,
    mvtec_loco,
    real_iad,
    visa,
)
from fastflow_jax.errors import InputError

OFFICIAL = {
    module.__name__.rpartition(".")[2]: dict(module.COUNTS)
    for module in (dagm, mpdd, mvtec_ad_2, mvtec_loco, visa)
}


def write(path, value, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    # Noise makes files long enough to be cut.
    levels = np.random.default_rng(value).integers(0, 2, (6, 8)).astype(np.uint8) + value
    Image.fromarray(levels).convert(mode).save(path, **({"quality": 100} if mode == "RGB" else {}))


def write_mask(path, n, level=255):
    """Saves a mask of 6 x 8 pixels, the first `n` defective."""
    mask = np.zeros(48, np.uint8)
    mask[:n] = level
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.reshape(6, 8)).save(path)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


VISA_ROWS = [
    ("object", "split", "label", "image", "mask"),
    ("candle", "train", "normal", "candle/Data/Images/Normal/0836.JPG", ""),
    ("candle", "train", "normal", "candle/Data/Images/Normal/0451.JPG", ""),
    ("candle", "test", "normal", "candle/Data/Images/Normal/0001.JPG", ""),
    (
        *("candle", "test", "anomaly", "candle/Data/Images/Anomaly/000.JPG"),
        "candle/Data/Masks/Anomaly/000.png",
    ),
    (
        *("candle", "test", "anomaly", "candle/Data/Images/Anomaly/001.JPG"),
        "candle/Data/Masks/Anomaly/001.png",
    ),
    ("pcb1", "train", "normal", "pcb1/Data/Images/Normal/0001.JPG", ""),
]


def make_visa(root):
    for i, (name, _, _, image, mask) in enumerate(VISA_ROWS[1:]):
        if name == "candle":
            write(root / image, 10 + i)
        if mask:
            write_mask(root / mask, 3, level=2)  # masks have levels of classes
    write_rows(root / "split_csv/1cls.csv", VISA_ROWS)
    (root / "candle/image_anno.csv").write_text("image,label,mask\n")


def make_ad2(root):
    can = root / "can"
    for i in range(2):
        write(can / f"train/good/00{i}_regular.png", 10 + i)
    write(can / "validation/good/000_regular.png", 20)
    write(can / "test_public/good/000_regular.png", 30)
    for i in range(2):
        write(can / f"test_public/bad/00{i}_overexposed.png", 31 + i)
        write_mask(can / f"test_public/ground_truth/bad/00{i}_overexposed_mask.png", 4 + i)
    for split, suffix in (("test_private", "regular"), ("test_private_mixed", "mixed")):
        write(can / split / f"000_{suffix}.png", 40)


def make_loco(root):
    box = root / "breakfast_box"
    for i in range(2):
        write(box / f"train/good/00{i}.png", 10 + i)
    write(box / "validation/good/000.png", 20)
    write(box / "test/good/000.png", 30)
    write(box / "test/logical_anomalies/000.png", 31)
    write(box / "test/structural_anomalies/000.png", 32)
    write(box / "test/structural_anomalies/001.png", 33)
    truth = box / "ground_truth"
    write_mask(truth / "logical_anomalies/000/000.png", 6, level=255)
    write_mask(truth / "logical_anomalies/000/001.png", 9, level=254)  # overlaps with the first
    write_mask(truth / "structural_anomalies/000/000.png", 3, level=253)
    write_mask(truth / "structural_anomalies/001/000.png", 5, level=253)
    kinds = [(255, 4, False), (254, 100, False), (253, 0.5, True)]
    config = [
        {
            "defect_name": f"kind_{level}",
            "pixel_value": level,
            "saturation_threshold": threshold,
            "relative_saturation": is_relative,
        }
        for level, threshold, is_relative in kinds
    ]
    (box / "defects_config.json").write_text(json.dumps(config))


def make_mpdd(root):
    tubes = root / "tubes"
    for i in range(2):
        write(tubes / f"train/good/00{i}.png", 10 + i)
    write(tubes / "test/good/000.png", 30)
    for i in range(2):
        write(tubes / f"test/anomalous/00{i}.png", 31 + i)
        write_mask(tubes / f"ground_truth/anomalous/00{i}_mask.png", 4 + i)


def make_ksdd(root):
    for part in range(1, 6):
        for i in range(2):
            write(root / f"kos0{part}/Part{i}.jpg", 10 * part + i, mode="RGB")
            write_mask(root / f"kos0{part}/Part{i}_label.bmp", 5 if (part, i) == (2, 1) else 0)


def make_ksdd2(root):
    for split, images in (("train", ((10000, 0), (10001, 7))), ("test", ((20000, 0), (20001, 2)))):
        for number, n in images:
            write(root / f"{split}/{number}.png", number % 100)
            write_mask(root / f"{split}/{number}_GT.png", n)
    write(root / "train/10000(copy).png", 0)
    write_mask(root / "train/10000(copy)_GT.png", 0)


def make_dagm(root):
    for split, value in (("Train", 10), ("Test", 20)):
        for i in range(4):
            write(root / f"Class1/{split}/000{i}.PNG", value + i)
        for i in (2, 3):
            write_mask(root / f"Class1/{split}/Label/000{i}_label.PNG", 4 + i)
        lines = "1\n0\t0\t0000.PNG\t0\n2\t1\t0002.PNG\t0002_label.PNG\n"
        (root / f"Class1/{split}/Label/Labels.txt").write_text(lines)


def make_aebad(root):
    folder = root / "AeBAD_S"
    for i, domain in enumerate(("background", "illumination", "view")):
        write(folder / f"train/good/{domain}/IMG_{i}.png", 10 + i)
    for domain in ("same", "view"):
        write(folder / f"test/good/{domain}/IMG_5.png", 20)
        write(folder / f"test/ablation/{domain}/IMG_6.png", 21)
        write_mask(folder / f"ground_truth/ablation/{domain}/IMG_6.png", 8)


def make_aebad_v(root):
    make_aebad(root)
    for path, value in (
        *(("train/good/video1_train/0.jpg", 10), ("train/good/video2_train/0.jpg", 11)),
        *(("test/video1/good/0.jpg", 20), ("test/video1/anomaly/0.jpg", 21)),
        ("test/video2/anomaly/0.jpg", 22),
    ):
        write(root / "AeBAD_V" / path, value, mode="RGB")


def real_iad_lists():
    def entry(kind, sample, view, mask=False):
        name = f"{kind}/S{sample:04}/mint_{sample:04}_{kind.replace('/', '_')}_C{view}_2023"
        return {
            "category": "mint",
            "anomaly_class": kind.rpartition("/")[2],
            "image_path": f"{name}.jpg",
            "mask_path": f"{name}.png" if mask else None,
        }

    return {
        "meta": {"prefix": "mint/", "normal_class": "OK"},
        "train": [entry("OK", sample, view) for sample in (1, 2) for view in (1, 2)],
        "test": [entry("OK", 3, 1), entry("NG/AK", 4, 1, mask=True)],
    }


def make_real_iad(root, lists="realiad_jsons"):
    content = real_iad_lists()
    for i, entry in enumerate(content["train"] + content["test"]):
        write(root / "realiad_1024/mint" / entry["image_path"], 10 + i, mode="RGB")
        if entry["mask_path"]:
            write_mask(root / "realiad_1024/mint" / entry["mask_path"], 9)
    path = root / lists / "mint.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))


@dataclasses.dataclass(frozen=True)
class Case:
    """A miniature data set, what is read from it, and paths that can be spoilt."""

    name: str
    category: str | None
    make: Callable[[Path], None]
    train: tuple[str, ...]
    test: dict[str, tuple[str, int | None]]  # name -> defect, defective pixels
    mask: str | None  # of a defective test image
    image: str  # the image of this mask
    stray: str  # a file that is not an image
    orphan: str | None  # a mask without an image
    first: str  # a training image
    twin: str | None  # an image of the same name as `first`, but for the extension


CASES = [
    Case(
        *("visa", "candle", make_visa, ("good/0451.JPG", "good/0836.JPG")),
        {"bad/000.JPG": ("bad", 3), "bad/001.JPG": ("bad", 3), "good/0001.JPG": ("good", 0)},
        "candle/Data/Masks/Anomaly/000.png",
        "candle/Data/Images/Anomaly/000.JPG",
        "candle/Data/Images/Normal/notes.txt",
        "candle/Data/Masks/Anomaly/002.png",
        "candle/Data/Images/Normal/0836.JPG",
        "candle/Data/Images/Normal/0836.png",
    ),
    Case(
        *("mvtec_ad_2", "can", make_ad2, ("good/000_regular.png", "good/001_regular.png")),
        {
            "bad/000_overexposed.png": ("bad", 4),
            "bad/001_overexposed.png": ("bad", 5),
            "good/000_regular.png": ("good", 0),
        },
        "can/test_public/ground_truth/bad/000_overexposed_mask.png",
        "can/test_public/bad/000_overexposed.png",
        "can/test_public/bad/notes.txt",
        "can/test_public/ground_truth/bad/002_mask.png",
        "can/train/good/000_regular.png",
        "can/train/good/000_regular.bmp",
    ),
    Case(
        *("mvtec_loco", "breakfast_box", make_loco, ("good/000.png", "good/001.png")),
        {
            "good/000.png": ("good", 0),
            "logical_anomalies/000.png": ("logical_anomalies", 9),
            "structural_anomalies/000.png": ("structural_anomalies", 3),
            "structural_anomalies/001.png": ("structural_anomalies", 5),
        },
        "breakfast_box/ground_truth/structural_anomalies/000/000.png",
        "breakfast_box/test/structural_anomalies/000.png",
        "breakfast_box/ground_truth/logical_anomalies/000/notes.txt",
        "breakfast_box/ground_truth/logical_anomalies/007/000.png",
        "breakfast_box/train/good/000.png",
        "breakfast_box/train/good/000.bmp",
    ),
    Case(
        *("mpdd", "tubes", make_mpdd, ("good/000.png", "good/001.png")),
        {
            "anomalous/000.png": ("anomalous", 4),
            "anomalous/001.png": ("anomalous", 5),
            "good/000.png": ("good", 0),
        },
        "tubes/ground_truth/anomalous/000_mask.png",
        "tubes/test/anomalous/000.png",
        "tubes/test/good/notes.txt",
        "tubes/ground_truth/anomalous/002_mask.png",
        "tubes/train/good/000.png",
        "tubes/train/good/000.bmp",
    ),
    Case(
        *("kolektor_sdd", None, make_ksdd),
        tuple(f"kos0{part}/Part{i}.jpg" for part in range(1, 5) for i in range(2) if part * i != 2),
        {
            "kos02/Part1.jpg": ("defect", 5),
            "kos05/Part0.jpg": ("good", 0),
            "kos05/Part1.jpg": ("good", 0),
        },
        "kos02/Part1_label.bmp",
        "kos02/Part1.jpg",
        "kos03/notes.txt",
        "kos03/Part7_label.bmp",
        "kos01/Part0.jpg",
        "kos01/Part0.png",
    ),
    Case(
        *("kolektor_sdd2", None, make_ksdd2, ("train/10000.png",)),
        {"test/20000.png": ("good", 0), "test/20001.png": ("defect", 2)},
        "test/20001_GT.png",
        "test/20001.png",
        "train/notes.txt",
        "test/20007_GT.png",
        "train/10000.png",
        "train/10000.bmp",
    ),
    Case(
        *("dagm", "Class1", make_dagm, ("0000.PNG", "0001.PNG")),
        {
            "0000.PNG": ("good", 0),
            "0001.PNG": ("good", 0),
            "0002.PNG": ("defect", 6),
            "0003.PNG": ("defect", 7),
        },
        "Class1/Test/Label/0002_label.PNG",
        "Class1/Test/0002.PNG",
        "Class1/Train/notes.txt",
        "Class1/Test/Label/0007_label.PNG",
        "Class1/Train/0000.PNG",
        "Class1/Train/0000.bmp",
    ),
    Case(
        *("aebad", "view", make_aebad),
        ("good/background/IMG_0.png", "good/illumination/IMG_1.png", "good/view/IMG_2.png"),
        {"ablation/view/IMG_6.png": ("ablation", 8), "good/view/IMG_5.png": ("good", 0)},
        "AeBAD_S/ground_truth/ablation/view/IMG_6.png",
        "AeBAD_S/test/ablation/view/IMG_6.png",
        "AeBAD_S/train/good/view/notes.txt",
        "AeBAD_S/ground_truth/ablation/view/IMG_7.png",
        "AeBAD_S/train/good/background/IMG_0.png",
        "AeBAD_S/train/good/background/IMG_0.bmp",
    ),
    Case(
        *("aebad", "video1", make_aebad_v),
        ("good/video1_train/0.jpg", "good/video2_train/0.jpg"),
        {"anomaly/0.jpg": ("anomaly", None), "good/0.jpg": ("good", None)},
        None,
        "AeBAD_V/test/video1/anomaly/0.jpg",
        "AeBAD_V/test/video1/anomaly/notes.txt",
        None,
        "AeBAD_V/train/good/video1_train/0.jpg",
        "AeBAD_V/train/good/video1_train/0.png",
    ),
    *(
        Case(
            *(name, "mint", lambda root, lists=lists: make_real_iad(root, lists)),
            tuple(entry["image_path"] for entry in real_iad_lists()["train"]),
            {
                "OK/S0003/mint_0003_OK_C1_2023.jpg": ("good", 0),
                "NG/AK/S0004/mint_0004_NG_AK_C1_2023.jpg": ("AK", 9),
            },
            "realiad_1024/mint/NG/AK/S0004/mint_0004_NG_AK_C1_2023.png",
            "realiad_1024/mint/NG/AK/S0004/mint_0004_NG_AK_C1_2023.jpg",
            "realiad_1024/mint/notes.txt",
            None,
            "realiad_1024/mint/OK/S0001/mint_0001_OK_C1_2023.jpg",
            None,
        )
        for name, lists in (("real_iad", "realiad_jsons"), ("real_iad_sv", "realiad_jsons_sv"))
    ),
]
IDS = [f"{case.name}-{case.category}" for case in CASES]


@pytest.fixture(params=CASES, ids=IDS)
def case(request):
    return request.param


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    """Sets the official counts to those of the miniature trees."""
    for module, counts in (
        (visa, (2, 3)),
        (mvtec_ad_2, (None, 3)),
        (mvtec_loco, (2, 4)),
        (mpdd, (2, 3)),
        (dagm, (2, 4)),
        (kolektor_sdd, (1, 2)),
    ):
        monkeypatch.setattr(module, "COUNTS", dict.fromkeys(module.COUNTS, counts))
    monkeypatch.setattr(kolektor_sdd, "COUNT", 10)


@pytest.fixture
def opened(data_config, tmp_path):
    """Opens the data set of a case; the prepared data are in another directory."""

    def opened(case, root):
        fields = {"category": case.category, "root": str(root), "dir": str(tmp_path / "prepared")}
        return open_dataset(data_config(case.name, **fields))

    return opened


def test_names_defects_and_masks(case, opened, tmp_path):
    case.make(tmp_path / "raw")
    for _ in range(2):  # prepared now, then read
        dataset = opened(case, tmp_path / "raw")
        assert dataset.name == case.name
        assert dataset.train.names == case.train
        assert not dataset.train.labels.any()
        assert dataset.test.names == tuple(case.test)
        assert dataset.test.defects == tuple(defect for defect, _ in case.test.values())
        found = [e.mask if e.mask is None else int(e.mask.sum()) for e in dataset.test]
        assert found == [n for _, n in case.test.values()]
        assert len({e.image.tobytes() for e in dataset.train}) == len(case.train)
        assert dataset.provenance["licence"]


def test_one_level_deeper(case, opened, tmp_path):
    case.make(tmp_path / "raw/downloaded")
    assert opened(case, tmp_path / "raw").train.names == case.train


def test_missing_data_is_reported_with_instructions(case, opened, tmp_path):
    with pytest.raises(InputError, match=rf"^{case.name}.* is not in .*raw\. .*http"):
        opened(case, tmp_path / "raw")


def error_of(opened, case, root):
    with pytest.raises(InputError) as error:
        opened(case, root)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_mask(case, opened, tmp_path):
    if case.mask is None:
        pytest.skip("the set has no masks")
    case.make(tmp_path)
    (tmp_path / case.mask).unlink()
    message = error_of(opened, case, tmp_path)
    assert any(str(tmp_path / path) in message for path in (case.image, case.mask))


def test_a_mask_without_an_image(case, opened, tmp_path):
    if case.orphan is None:
        pytest.skip("there are no masks, or lists name them")
    case.make(tmp_path)
    write_mask(tmp_path / case.orphan, 3)
    assert str(tmp_path / case.orphan) in error_of(opened, case, tmp_path)


def test_a_missing_image(case, opened, tmp_path):
    if case.mask is None:
        pytest.skip("the set has no masks")
    case.make(tmp_path)
    (tmp_path / case.image).unlink()
    message = error_of(opened, case, tmp_path)
    assert any(str((tmp_path / path).parent) in message for path in (case.image, case.mask))


def test_a_stray_file(case, opened, tmp_path):
    case.make(tmp_path)
    (tmp_path / case.stray).write_text("?")
    assert re.search(rf"{tmp_path / case.stray} is not an image", error_of(opened, case, tmp_path))


@pytest.mark.parametrize("which", ["first", "mask"])
def test_a_truncated_file(case, which, opened, tmp_path):
    if getattr(case, which) is None:
        pytest.skip("the set has no masks")
    case.make(tmp_path)
    path = tmp_path / getattr(case, which)
    path.write_bytes(path.read_bytes()[:-30])
    message = error_of(opened, case, tmp_path)
    assert message.startswith(str(path))
    assert "broken" in message or "not an image" in message


def test_a_duplicate_name(case, opened, tmp_path):
    if case.twin is None:
        pytest.skip("lists name the files")
    case.make(tmp_path)
    write(tmp_path / case.twin, 99)
    assert str(tmp_path / case.twin) in error_of(opened, case, tmp_path)


def test_a_twin_in_a_list(opened, tmp_path):
    case = CASES[IDS.index("visa-candle")]
    case.make(tmp_path)
    write_rows(tmp_path / "split_csv/1cls.csv", [*VISA_ROWS, VISA_ROWS[1]])
    assert re.search(r"0836\.JPG have the same name", error_of(opened, case, tmp_path))


def test_a_damaged_list_is_named(opened, tmp_path):
    for name, path, content in (
        ("visa-candle", "split_csv/1cls.csv", "object\ncandle,train"),
        ("visa-candle", "split_csv/1cls.csv", "\ncandle,test,normal,a.JPG,mask.png"),
        ("real_iad-mint", "realiad_jsons/mint.json", "{"),
        ("real_iad-mint", "realiad_jsons/mint.json", '{"train": [{}]}'),
        ("mvtec_loco-breakfast_box", "breakfast_box/defects_config.json", "[1]"),
    ):
        case, root = CASES[IDS.index(name)], tmp_path / f"{name} {len(content)}"
        case.make(root)
        (root / path).write_text(content)
        assert error_of(opened, case, root).startswith(f"{root / path} cannot be read")


def test_regions_and_saturations_of_loco(opened, tmp_path):
    case = CASES[IDS.index("mvtec_loco-breakfast_box")]
    case.make(tmp_path)
    dataset = opened(case, tmp_path)
    assert [example.name for example in dataset.calibration] == ["good/000.png"]
    assert dataset.train.regions is None
    good, logical, structural = (dataset.test.regions(i) for i in range(3))
    assert good.masks.shape == (0, 6, 8)
    assert good.saturation.shape == (0,)
    # 4 of 6 pixels; 100 pixels, but at most all 9; half of 3 pixels, rounded down.
    assert logical.masks.sum((1, 2)).tolist() == [6, 9]
    np.testing.assert_allclose(logical.saturation, [4 / 6, 1])
    np.testing.assert_allclose(structural.saturation, [1 / 3])
    np.testing.assert_array_equal(logical.masks.any(0), dataset.test[1].mask)


def test_a_level_without_a_kind_in_loco(opened, tmp_path):
    case = CASES[IDS.index("mvtec_loco-breakfast_box")]
    case.make(tmp_path)
    write_mask(tmp_path / case.mask, 3, level=7)
    assert re.search(rf"{tmp_path / case.mask} does not have one", error_of(opened, case, tmp_path))


def test_calibration_images_of_ad2(opened, tmp_path):
    case = CASES[IDS.index("mvtec_ad_2-can")]
    case.make(tmp_path)
    dataset = opened(case, tmp_path)
    assert dataset.calibration.names == ("good/000_regular.png",)
    assert dataset.provenance["calibration_images"] == 1


def test_views_of_one_sample_are_a_group(opened, tmp_path):
    case = CASES[IDS.index("real_iad-mint")]
    case.make(tmp_path)
    dataset = opened(case, tmp_path)
    assert dataset.train.groups == ("OK/S0001", "OK/S0001", "OK/S0002", "OK/S0002")
    assert dataset.test.groups == ("OK/S0003", "NG/AK/S0004")


def test_files_that_no_list_of_real_iad_names(opened, tmp_path):
    case = CASES[IDS.index("real_iad-mint")]
    case.make(tmp_path)
    write(tmp_path / "realiad_1024/mint/OK/S0001/other.jpg", 1, mode="RGB")
    with pytest.warns(UserWarning, match=r"^1 files are not in .*mint\.json, such as .*other\.jpg"):
        opened(case, tmp_path)


def test_unofficial_counts_are_a_warning(case, opened, tmp_path, monkeypatch):
    modules = {
        module.__name__.rpartition(".")[2]: module
        for module in (dagm, mpdd, mvtec_ad_2, mvtec_loco, visa)
    }
    if case.name not in modules:
        pytest.skip("the set has no counts of categories")
    monkeypatch.setattr(modules[case.name], "COUNTS", OFFICIAL[case.name])
    case.make(tmp_path)
    official = OFFICIAL[case.name][case.category][1]
    with pytest.warns(UserWarning, match=rf"test images, but officially .*{official}\. Do not"):
        opened(case, tmp_path)


def test_unofficial_counts_of_kolektor(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(kolektor_sdd, "COUNT", 399)
    case = CASES[IDS.index("kolektor_sdd-None")]
    case.make(tmp_path)
    with pytest.warns(UserWarning, match="has 10 images, but officially 399"):
        opened(case, tmp_path)


def test_the_official_totals():
    def total(name, part):
        return sum(counts[part] for counts in OFFICIAL[name].values())

    # VisA: 10,821 images, 1,200 of them defective; 8,659 in the training split.
    assert (total("visa", 0), total("visa", 1)) == (8659, 962 + 1200)
    # LOCO: 1,772 training images; 575 good, 561 logical and 432 structural test images.
    assert (total("mvtec_loco", 0), total("mvtec_loco", 1)) == (1772, 575 + 561 + 432)
    # MPDD: 888 training images; 176 good and 282 defective test images.
    assert (total("mpdd", 0), total("mpdd", 1)) == (888, 176 + 282)
    # DAGM: 7,004 of 8,050 training images are normal; 8,050 test images.
    assert (total("dagm", 0), total("dagm", 1)) == (7004, 8050)
    assert sum(mvtec_ad_2.PRIVATE_COUNTS.values()) * 2 == 4090


def test_sets_of_several_categories(data_config):
    numbers = {name: len(categories(data_config(name))) for name in OFFICIAL}
    assert numbers == {
        "dagm": 10,
        "mpdd": 6,
        "mvtec_ad_2": 8,
        "mvtec_loco": 5,
        "visa": 12,
    }
    assert len(categories(data_config("aebad"))) == 7
    assert len(set(real_iad.CATEGORIES)) == 30
    assert categories(data_config("kolektor_sdd2")) == (None,)


def test_a_category_of_a_set_without(data_config):
    with pytest.raises(InputError, match=r"^data\.category is 'kos01', but kolektor_sdd has no"):
        open_dataset(data_config("kolektor_sdd", category="kos01"))
