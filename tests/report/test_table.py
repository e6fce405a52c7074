"""Tables: rows, columns, published results and their sources."""

import csv
import io

import numpy as np
import pytest

from fastflow_jax.data.tfds import btad, cifar10, mvtec_ad
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.evaluate import METRICS
from fastflow_jax.report.table import (
    check_metrics,
    format_csv,
    format_markdown,
    format_table,
    published,
    table_cells,
)


def results(categories, dataset="folder", backbone="resnet18", std=None, note=None, missing=()):
    rows = {
        name: {
            m: None if m in missing else round(0.9 + i / 1000 + j / 100, 4)
            for j, m in enumerate(METRICS)
        }
        for i, name in enumerate(categories)
    }
    mean = {
        m: None if m in missing else float(np.mean([row[m] for row in rows.values()]))
        for m in METRICS
    }
    data = {name: {"source": "here"} | ({"note": note} if note else {}) for name in categories}
    return {
        "categories": rows,
        "mean": mean,
        "std": std,
        "variants": None,
        "protocol": {"dataset": dataset, "backbone": backbone, "data": data},
    }


def test_there_is_a_row_per_category_and_for_the_mean():
    text = format_table(results(["one", "three"])).splitlines()
    heads = [head.strip() for head in text[0].split("  ") if head]
    assert heads == ["image AUROC", "pixel AUROC", "AUPRO", "pixel AP", "AUPIMO"]
    places = [
        METRICS.index(m) for m in ("image_auroc", "pixel_auroc", "aupro", "pixel_ap", "aupimo")
    ]
    assert text[2].split() == ["one", *(f"{0.9 + j / 100:.4f}" for j in places)]
    assert text[-1].split()[:2] == ["mean", "0.9005"]
    assert len({len(line) for line in text}) == 1
    assert set(text[1]) == set(text[-2]) == {"-"}


def test_metrics_without_values_are_omitted():
    text = format_table(results(["one"], missing=[m for m in METRICS if not m.startswith("image")]))
    assert "image AP" in text
    assert "pixel" not in text
    assert "AUPRO" not in text


def test_runs_of_earlier_versions_have_no_column_for_newer_metrics():
    old = results(["one", "two"], std=dict.fromkeys(METRICS, 0.01))
    for row in (*old["categories"].values(), old["mean"], old["std"]):
        for metric in METRICS:
            if metric not in ("image_auroc", "pixel_auroc", "aupro"):
                del row[metric]
    lines = format_table(old).splitlines()
    assert "AUPIMO" not in lines[0]
    assert lines[-1].split()[1::3] == [f"{0.9005 + j / 100:.4f}" for j in range(3)]


def test_chosen_metrics_are_the_columns():
    whole = results(["one"], missing=["spro_05"])
    whole["protocol"]["metrics"] = ["seg_f1", "spro_05", "image_auroc"]
    assert table_cells(whole)[0] == ["", "SegF1", "image AUROC"]
    whole = results(mvtec_ad.CATEGORIES, "mvtec_ad", "wide_resnet50_2")
    whole["protocol"]["metrics"] = ["aupimo"]
    assert table_cells(whole)[0][1:3] == ["AUPIMO", "paper pixel"]


def test_all_metrics_have_a_title_and_others_are_refused():
    check_metrics(METRICS)
    with pytest.raises(InputError, match=r"config.metrics has 'aupr0'. Did you mean aupro?"):
        check_metrics(["image_auroc", "aupr0"])


def test_the_deviation_over_seeds_follows_the_mean():
    deviations = dict.fromkeys(METRICS, 0.0123)
    lines = format_table(results(["one", "two"], std=deviations)).splitlines()
    assert "0.9005 ± 0.0123" in lines[-1]
    assert all("±" not in line for line in lines[:-1])


def test_published_results_have_columns_and_sources():
    text = format_table(results(mvtec_ad.CATEGORIES, "mvtec_ad", "wide_resnet50_2"))
    lines = text.splitlines()
    assert "gathierry last" in lines[0]
    assert "image F1" not in text
    bottle = next(line for line in lines if line.startswith("bottle")).split()
    # ours: image, pixel, AUPRO; the paper's pixel; gathierry's last and best; anomalib's two.
    assert bottle == ["bottle", "0.9000", "0.9100", "0.9200", "-", "0.987", "0.989", "-", "-"]
    mean = next(line for line in lines if line.startswith("mean")).split()
    assert mean[-5:] == ["0.981", "0.972", "0.983", "0.963", "0.979"]
    assert "gathierry last (pixel): README of gathierry/FastFlow" in text
    assert "2111.07677" in text


def test_a_published_mean_is_omitted_for_other_categories():
    text = format_table(results(["screw", "bottle"], "mvtec_ad", "resnet18"))
    mean = next(line for line in text.splitlines() if line.startswith("mean"))
    assert mean.split()[4:] == ["-", "-", "-"]
    assert "0.521" in text  # anomalib's image AUROC of screw
    assert "paper" not in text  # the paper gives only means


@pytest.mark.parametrize("dataset", ["folder", "elpv", "btad"])
def test_other_data_sets_have_no_published_results(dataset):
    assert published(dataset, "resnet18") == ()


def test_cifar10_has_the_mean_of_the_paper_for_all_backbones():
    text = format_table(results(cifar10.CATEGORIES, "cifar10", "tf_efficientnet_lite0"))
    assert next(x for x in text.splitlines() if x.startswith("mean")).endswith(" 0.667")
    assert "paper" not in format_table(results(["bird"], "cifar10"))


@pytest.mark.parametrize(
    "backbone",
    ["resnet18", "wide_resnet50_2", "deit_base_distilled_patch16_384", "cait_m48_448"],
)
def test_published_means_equal_the_means_of_the_published_categories(backbone):
    columns = published("mvtec_ad", backbone)
    assert len(columns) >= 5
    for column in columns:
        assert set(column.figures) <= set(mvtec_ad.CATEGORIES)
        assert column.metric in METRICS
        assert 0.8 < column.mean < 1
        if len(column.figures) == column.categories == 15:
            assert np.mean(list(column.figures.values())) == pytest.approx(column.mean, abs=6e-4)


def variants_of(names, std=None):
    whole = results(["mono"], missing=("aupro", "aupro_05", "pixel_ap"))
    whole["variants"] = {
        name: results(["mono"]) | {"mean": dict.fromkeys(METRICS, 0.5 + i / 10), "std": std}
        for i, name in enumerate(names)
    }
    return whole


def test_variants_have_a_row_each_and_no_mean():
    lines = format_table(variants_of(["untouched", "rotate_5"])).splitlines()
    assert lines[2].split() == ["untouched", *["0.5000"] * 5]
    assert lines[3].split() == ["rotate_5", *["0.6000"] * 5]
    assert len(lines) == 4
    deviations = dict.fromkeys(METRICS, 0.02)
    assert "0.6000 ± 0.0200" in format_table(variants_of(["a", "b"], deviations)).splitlines()[3]


NOTE = "read from image files"


def test_a_note_on_the_data_is_below_the_table_once():
    whole = results(["bird", "cat"], "cifar10", note=NOTE)
    for text in (format_table(whole), format_markdown(whole)):
        assert text.count(f"Data: {NOTE}.") == 1
    rows = list(csv.DictReader(io.StringIO(format_csv(whole))))
    assert {row["notes"] for row in rows} == {f"Data: {NOTE}."}


def test_markdown_and_csv_have_the_same_cells():
    whole = results(mvtec_ad.CATEGORIES, "mvtec_ad", "cait_m48_448")
    rows = list(csv.reader(io.StringIO(format_csv(whole))))
    lines = [line for line in format_markdown(whole).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1:-1] for row in rows] == [row[1:] for row in [cells[0], *cells[2:]]]
    assert rows[0][1:5] == ["image AUROC", "pixel AUROC", "AUPRO", "paper image"]
    assert [row[0] for row in rows[1:]] == [*mvtec_ad.CATEGORIES, "mean"]
    assert rows[1][4:6] == ["1.000", "0.977"]


def test_btad_categories_stay_text():
    assert format_csv(results(btad.CATEGORIES, "btad")).splitlines()[1].startswith("01,")
