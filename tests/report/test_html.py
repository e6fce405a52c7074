"""Reports: content, independence from other files, and behaviour in a browser."""

import dataclasses
import html.parser
import json
import re

import chromium
import numpy as np
import pytest
from PIL import Image

from fastflow_jax.data.dataset import GOOD, Source
from fastflow_jax.data.transforms import placement
from fastflow_jax.evaluation.evaluate import METRICS, Limits, Scored, evaluate, measure
from fastflow_jax.files import files_in
from fastflow_jax.report import html as reports
from fastflow_jax.report.html import part_page, write_reports
from fastflow_jax.report.pictures import write_pictures
from fastflow_jax.report.table import TITLES

HOSTILE = [
    "<script>hacked=1<.png",
    "</script><img src=x onerror=hacked=1>.png",
    "\"'&amp; ü\udcff.png",
]
VOID = {"meta", "link", "input", "img", "br"}


def scored_images(n=40, seed=0, masks=True):
    """Returns a source of n images, the first third good, their scores and anomaly maps."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) >= n // 3).astype(np.int32)
    defects = tuple(("crack", HOSTILE[1])[i % 2] if bad else GOOD for i, bad in enumerate(labels))
    names = (*HOSTILE, *(f"{i:04}.png" for i in range(n)))[:n]
    truth = np.zeros((n, 32, 48), bool)
    truth[labels == 1, 5:15, 8:30] = True
    images = rng.integers(0, 255, (n, 32, 48, 3), np.uint8)
    source = Source(names, defects, lambda i: (images[i], truth[i] if masks else None))
    maps = (rng.normal(0, 1, truth.shape) + 1.5 * truth).astype(np.float32)
    scores = (rng.normal(0, 1, n) + 1.5 * labels).astype(np.float32)
    return source, Scored(scores, labels, *((maps, truth) if masks else (None, None)), None), maps


LIMITS = Limits(image=1.0, pixel=2.0)


def draw(folder, source, scored, maps, *, heatmaps, strips, aupimo=None):
    """Writes the pictures of images that have the size of their maps."""
    write_pictures(
        folder,
        source,
        scored,
        lambda indices: (maps[i] for i in indices),
        heatmaps=heatmaps,
        strips=strips,
        placed=lambda size: placement(size, (32, 48), "square"),
        threshold=None,
        aupimo=aupimo,
    )


def write_part(folder, name="screw", seed=0, variant=None, strips=1000, **fields):
    """Writes one training of a run, as `runs.experiment.run` does."""
    source, scored, maps = scored_images(seed=seed, **fields)
    folder.mkdir(parents=True, exist_ok=True)
    figures, details = evaluate(scored, source.defects, LIMITS)
    draw(folder, source, scored, maps, heatmaps=0, strips=strips, aupimo=details.aupimo)
    epochs = [{"epoch": i, "step": 2 * i, "loss": 1 / i, "holdout_loss": 2 / i} for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs))
    part = {
        "name": name,
        "variant": variant,
        "seed": seed,
        "figures": figures,
        "kinds": details.kinds,
        "sizes": details.sizes,
        "data": {"source": "<b>here</b>", "trained_on": 50, "held_out": 6},
        "weights": {"source": "a file", "sha256": "5793442"},
        "training": ".",
        "thresholds": {"image": None, "pixel": None},
        "seconds": {"train": 12.5},
    }
    (folder / "part.json").write_text(json.dumps(part))
    return part


def write_run(workdir, parts, seeds=(0,), variants=None):
    """Writes the other files of a run directory; returns its report."""
    workdir.mkdir(parents=True, exist_ok=True)
    config = {"detector": "fastflow", "data": {"name": "folder"}, "backbone": "resnet18"}
    config |= {"image_size": [32, 48], "seeds": len(seeds), "flow": {"steps": 4}}
    (workdir / "config.json").write_text(json.dumps(config))
    first = parts[0]["figures"]
    results = {
        "categories": {part["name"]: part["figures"] for part in parts},
        "mean": first,
        "std": dict.fromkeys(METRICS, 0.01) if len(seeds) > 1 else None,
        "variants": variants,
        "protocol": {
            "chosen_on_test_data": "nothing",
            "dataset": "folder",
            "backbone": "resnet18",
            "weights": parts[0]["weights"],
            "seeds": list(seeds),
            "data": {part["name"]: part["data"] for part in parts},
        },
        "versions": {"jax": "0.10"},
        "seconds": {"screw/0": {"train": 12.5}},
    }
    (workdir / "results.json").write_text(json.dumps(results))
    write_reports(workdir)
    return (workdir / "report.html").read_text()


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, [write_part(folder)])
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A run with 2,000 images, each with a strip larger than those of smooth images."""
    folder = tmp_path_factory.mktemp("many")
    part = write_part(folder, n=2000, strips=1, masks=False)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (20, 80, 3), np.uint8))
    coarse.resize((640, 160), Image.Resampling.BICUBIC).save(folder / "strips" / "0.webp")
    content = (folder / "strips" / "0.webp").read_bytes()
    scored = json.loads((folder / "scores.json").read_text())
    scored["panels"] = ["image", "heat map", "mask", "ground truth"]
    for i, image in enumerate(scored["images"]):
        (folder / "strips" / f"{i}.webp").write_bytes(content)
        image["size"] = [160, 160]
    (folder / "scores.json").write_text(json.dumps(scored))
    write_run(folder, [part])
    return folder


class Checked(html.parser.HTMLParser):
    """Checks that elements are nested and closed; stores their attributes and texts."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.texts = [], [], {}
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.setdefault(self.open[-1] if self.open else None, []).append(text)


def embedded(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def counts(scores, labels, threshold):
    called, bad = np.array(scores) > threshold, np.array(labels) == 1
    return [int(n.sum()) for n in (called & bad, ~called & bad, called & ~bad, ~called & ~bad)]


def test_a_report_is_well_formed_and_loads_nothing(run_directory):
    page = (run_directory / "report.html").read_text()
    checked = Checked(page)
    ids = [a["id"] for _, a in checked.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in checked.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            link = attributes.get(name)
            assert link is None or link.startswith(("#", "data:,")), (tag, link)
        for name in ("aria-labelledby", "aria-controls", "for"):
            assert attributes.get(name) is None or attributes[name] in ids
        assert not any(name.startswith("on") for name in attributes)
        assert "url" not in attributes.get("style", "")
    style = "".join(checked.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in style + "".join(checked.texts["script"])


def test_file_and_defect_names_are_escaped(run_directory):
    page = (run_directory / "report.html").read_text()
    assert "hacked" in page
    checked = Checked(page)
    assert [tag for tag, _ in checked.elements].count("script") == 2
    assert "img" not in [tag for tag, _ in checked.elements]
    assert HOSTILE[1] + " (" in "".join(checked.texts["option"])
    assert "<b>here</b>" in "".join(checked.texts["dd"])
    assert set(HOSTILE) <= set(embedded(page)["names"])


def test_a_run_of_an_earlier_version_has_a_report_without_newer_metrics(tmp_path):
    part = write_part(tmp_path)
    del part["figures"]["aupro_05"], part["figures"]["aupimo"], part["kinds"], part["sizes"]
    (tmp_path / "part.json").write_text(json.dumps(part))
    page = write_run(tmp_path, [part])
    titles = Checked(page).texts
    assert "AUPRO" in titles["dt"]
    assert not {"AUPRO .05", "AUPIMO"} & {*titles["dt"], *titles["th"]}
    assert "Kinds of defects" not in titles["h2"]


def test_a_report_has_scores_metrics_and_provenance(run_directory):
    page = (run_directory / "report.html").read_text()
    source, scored, _ = scored_images()
    data = embedded(page)
    assert data["scores"] == [float(s) for s in scored.scores]
    assert data["labels"] == scored.labels.tolist()
    assert data["names"] == list(source.names)
    assert all(data["strips"])
    text = " ".join(" ".join(t) for t in Checked(page).texts.values())
    figures, details = evaluate(scored, source.defects, LIMITS)
    for metric, figure in figures.items():
        assert figure is None or f"{figure:.4f}" in text
        assert metric == "spro_05" or figure is not None
    for metric in ("image_auroc", "pixel_auroc", "aupro", "pixel_ap", "aupimo"):
        assert f"{figures[metric]:.3f}" in text
    assert data["aupimo"] == details.aupimo
    assert "40 test images: 13 good, 27 anomalous" in text
    for detail in ("5793442", "resnet18", "nothing chosen on test data", "12.5", "F1-optimal"):
        assert detail in text


def test_a_report_has_tables_of_kinds_and_sizes_of_defects(run_directory):
    source, scored, _ = scored_images()
    _, details = evaluate(scored, source.defects, LIMITS)
    cells = Checked((run_directory / "report.html").read_text()).texts
    assert {"crack", "all kinds", "10 to 100 %"} <= {*cells["th"]}
    for row in details.kinds:
        low, high = row["image_auroc"]["interval"]
        assert f"{row['image_auroc']['value']:.3f} ({low:.3f} to {high:.3f})" in cells["td"]
        assert f"{row['aupimo']:.3f}" in cells["td"]
    (size,) = details.sizes
    assert (size["regions"], size["low"]) == (27, 0.1)  # 220 of 1,536 pixels
    assert f"{size['found']} ({100 * size['found'] / 27:.0f} %)" in cells["td"]
    assert f"{100 * size['overlap']:.0f} %" in cells["td"]


def test_the_slider_starts_at_the_given_threshold_or_else_at_the_best_f1(run_directory):
    _, scored, _ = scored_images()
    data = embedded((run_directory / "report.html").read_text())

    def f1(threshold):
        tp, fn, fp, _ = counts(scored.scores, scored.labels, threshold)
        return 2 * tp / (2 * tp + fn + fp)

    assert f1(data["threshold"]) == pytest.approx(measure(scored)["image_f1"])
    results, config, part = (
        json.loads((run_directory / f"{name}.json").read_text())
        for name in ("results", "config", "part")
    )
    part["thresholds"]["image"] = {"value": 9.25, "rate": 0.05, "n": 40}
    part["thresholds"]["image"] |= {"interval": [0.01, 0.09], "confidence": 0.95}
    page = part_page(part, run_directory, config, results)
    assert embedded(page)["threshold"] == 9.25
    assert embedded(page)["low"] < 9.25 < embedded(page)["high"]
    assert "9.25: false-alarm rate 5.0%, true rate between 1.0% and 9.0% (95 %)." in page
    assert "The threshold comes from 40 held-out groups (6 images): false-alarm rate 5.0%" in page
    assert "F1-optimal on the test labels" not in page


def test_several_trainings_have_a_report_each_and_one_that_links_to_them(tmp_path):
    parts = [
        write_part(tmp_path / name / f"seed_{seed}", name, seed, n=9)
        for name in ("screw", "nut & bolt")
        for seed in (0, 1)
    ]
    top = Checked(write_run(tmp_path, parts, seeds=(0, 1)))
    links = [a["href"] for tag, a in top.elements if tag == "a" and a["href"].endswith("html")]
    assert links == [
        f"{name}/seed_{seed}/report.html" for name in ("screw", "nut & bolt") for seed in (0, 1)
    ]
    for link in links:
        page = (tmp_path / link).read_text()
        (back,) = re.findall('href="([.][^"]*)"', page)
        assert (tmp_path / link).parent.joinpath(back).resolve() == tmp_path / "report.html"
        assert link.split("/")[1].replace("_", " ") in re.search("<h1>(.*)</h1>", page).group(1)
    assert "± 0.010" in " ".join(top.texts["small"])


def test_variants_have_their_own_title_and_configuration(tmp_path):
    parts = [write_part(tmp_path / v, variant=v, n=9) for v in ("ours", "theirs")]
    figures = {"mean": parts[0]["figures"], "std": None}
    variants = {
        "ours": figures | {"changes": {}},
        "theirs": figures | {"changes": {"detector": "patchcore"}},
    }
    write_run(tmp_path, parts, variants=variants)
    title = re.search("<h1>(.*)</h1>", (tmp_path / "theirs" / "report.html").read_text()).group(1)
    assert title == "PatchCore on folder screw, theirs"


def test_without_test_images_the_report_shows_the_training(tmp_path):
    part = write_part(tmp_path)
    (tmp_path / "scores.json").unlink()
    part |= {"figures": dict.fromkeys(METRICS), "kinds": [], "sizes": []}
    (tmp_path / "part.json").write_text(json.dumps(part))
    checked = Checked(write_run(tmp_path, [part]))
    assert checked.texts["h3"] == ["Training"]
    assert "script" not in checked.texts


@pytest.mark.parametrize("shift", [-1000.0, -3.0, 200.0])
def test_the_range_of_the_slider_shifts_with_the_scores(run_directory, tmp_path, shift):
    rng = np.random.default_rng(0)
    part = json.loads((run_directory / "part.json").read_text())
    (tmp_path / "part.json").write_text(json.dumps(part))
    scores = np.concatenate([rng.normal(size=30), rng.normal(3, 1, size=30), [40.0]])

    def scale(moved):
        images = [
            {"name": f"{i}.png", "defect": "a", "label": int(i >= 30), "score": float(score)}
            for i, score in enumerate(moved)
        ]
        (tmp_path / "scores.json").write_text(json.dumps({"images": images}))
        data = embedded(write_run(tmp_path, [part]))
        return data["low"], data["high"]

    np.testing.assert_allclose(np.array(scale(scores + shift)) - shift, scale(scores), atol=1e-2)


@pytest.mark.parametrize("scores", [[1.0] * 4, [-np.inf, 0.0, 1.0, np.inf], [0, 1, 2, 1e30]])
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])
def test_all_scores_and_labels_have_a_report(run_directory, tmp_path, scores, labels):
    part = json.loads((run_directory / "part.json").read_text())
    images = [
        {"name": f"{i}.png", "defect": "a", "label": label, "score": score}
        for i, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]
    (tmp_path / "scores.json").write_text(json.dumps({"images": images}))
    (tmp_path / "part.json").write_text(json.dumps(part))
    data = embedded(write_run(tmp_path, [part]))
    assert np.isfinite([*data["scores"], data["low"], data["high"], data["threshold"]]).all()
    assert data["low"] < data["threshold"] < data["high"]


@pytest.mark.parametrize(
    ("label", "start", "pixels"),
    [(0, "the highest score", "good test images"), (1, "below all scores", "test images")],
)
def test_images_of_one_class_have_no_f1_and_other_thresholds(tmp_path, label, start, pixels):
    source, scored, maps = scored_images(n=9, masks=False)
    scored = scored._replace(labels=np.full(9, label, np.int32))
    part = write_part(tmp_path, n=9)
    draw(tmp_path, source, scored, maps, heatmaps=0, strips=9)
    part |= {"figures": measure(scored), "kinds": [], "sizes": []}
    (tmp_path / "part.json").write_text(json.dumps(part))
    page = write_run(tmp_path, [part])
    texts = Checked(page).texts
    assert not set(TITLES.values()) & {*texts["dt"], *texts["th"]}
    assert f": {start}." in page
    assert f"exceeded by 0.1 % of the pixels of {pixels})" in page
    called = np.array(embedded(page)["scores"]) > embedded(page)["threshold"]
    assert (called == bool(label)).all()


def test_the_number_of_strips_is_limited(tmp_path):
    part = write_part(tmp_path, strips=10)
    page = write_run(tmp_path, [part])
    data = embedded(page)
    kept = np.flatnonzero([strip is not None for strip in data["strips"]])
    assert len(kept) == 10 == len(list((tmp_path / "strips").iterdir()))
    order = np.argsort(-np.array(data["scores"]), kind="stable")
    ranks = np.flatnonzero(np.isin(order, kept))
    assert {0, 39} <= set(ranks)
    assert set(np.diff(ranks)) <= {4, 5}
    assert "10 of 40 images" in page


def test_a_report_on_two_thousand_images_has_a_bounded_size(many, monkeypatch):
    size = (many / "report.html").stat().st_size
    strip = (many / "strips" / "0.webp").stat().st_size
    assert 2000 * strip * 4 / 3 < size < 2000 * (strip * 4 / 3 + 200) + 100_000
    assert size < 65 * 2**20
    monkeypatch.setattr(reports, "_MOST_BYTES", 300 * strip)
    part, config, results = (
        json.loads((many / f"{name}.json").read_text()) for name in ("part", "config", "results")
    )
    page = part_page(part, many, config, results)
    assert len(page) < 300 * strip * 4 / 3 + 2000 * 200 + 100_000
    kept = sum(strip is not None for strip in embedded(page)["strips"])
    assert kept == 286  # every seventh
    assert "286 of 2,000 images" in page


# In a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if not chromium.BINARY:
        pytest.skip("Chromium was not found")
    with chromium.page(tmp_path_factory.mktemp("profile")) as page:
        page.size(1280, 900)
        yield page


SHOWN = "[...document.querySelectorAll('#gallery li')]"


def read_counts(page):
    return page.run(
        "['tp','fn','fp','tn'].map(id => parseInt(document.getElementById(id).textContent))"
    )


def test_the_slider_updates_counts_and_rates(run_directory, page):
    page.open(run_directory / "report.html")
    data = embedded((run_directory / "report.html").read_text())
    scores, labels = np.array(data["scores"]), np.array(data["labels"])
    assert read_counts(page) == counts(scores, labels, data["threshold"])
    for value in np.linspace(data["low"], data["high"], 7):
        page.run(
            f"(() => {{const s = document.getElementById('slider'); s.value = {float(value)!r};"
            "s.dispatchEvent(new Event('input', {bubbles: true}))})()"
        )
        threshold = float(page.run("document.getElementById('slider').value"))
        assert threshold == pytest.approx(value, abs=1e-9)
        tp, fn, fp, tn = counts(scores, labels, threshold)
        assert read_counts(page) == [tp, fn, fp, tn]
        rates = page.run(
            "['recall', 'alarms', 'f1'].map(id => document.getElementById(id).textContent)"
        )
        assert rates[0] == f"{100 * tp / (tp + fn):.1f} %"
        assert rates[1] == f"{100 * fp / (fp + tn):.1f} %"
        assert float(rates[2]) == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=6e-4)
        verdicts = page.run(f"{SHOWN}.map(item => item.dataset.verdict)")
        assert [verdicts.count(v) for v in ("tp", "fn", "fp", "tn")] == [tp, fn, fp, tn]
    assert page.errors == []


@pytest.mark.parametrize("label", [0, 1])
def test_images_of_one_class_have_no_f1_and_precision_in_the_browser(tmp_path, page, label):
    source, scored, maps = scored_images(n=9, masks=False)
    scored = scored._replace(labels=np.full(9, label, np.int32))
    part = write_part(tmp_path, n=9)
    draw(tmp_path, source, scored, maps, heatmaps=0, strips=9)
    write_run(tmp_path, [part])
    page.open(tmp_path / "report.html")
    rates = ["precision", "f1", "recall", "alarms"]
    shown = page.run(f"{rates}.map(id => document.getElementById(id).textContent)")
    assert shown == ["–", "–", *(("100.0 %", "–") if label else ("–", "0.0 %"))]
    assert page.errors == []


def test_keys_move_the_slider_and_a_typed_number_sets_it(run_directory, page):
    page.open(run_directory / "report.html")
    data = embedded((run_directory / "report.html").read_text())
    page.run("document.getElementById('slider').focus()")
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="PageUp", windowsVirtualKeyCode=33)
    moved = float(page.run("document.getElementById('slider').value"))
    step = (data["high"] - data["low"]) / 25
    assert moved == pytest.approx(data["threshold"] + step)
    assert read_counts(page) == counts(data["scores"], data["labels"], moved)
    page.run("document.getElementById('number').select()")
    page.call("Input.insertText", text="0.5")
    assert float(page.run("document.getElementById('slider').value")) == 0.5
    assert read_counts(page) == counts(data["scores"], data["labels"], 0.5)
    page.run("new Promise(done => setTimeout(done, 500))")
    spoken = page.run("document.getElementById('spoken').textContent")
    assert f"{read_counts(page)[2]} false alarms" in spoken
    page.run("document.getElementById('number').select()")
    score = data["scores"][20]
    page.call("Input.insertText", text=repr(score))  # a score is not above itself
    assert read_counts(page) == counts(data["scores"], data["labels"], score)
    page.run("document.getElementById('reset').click()")
    assert read_counts(page) == counts(data["scores"], data["labels"], data["threshold"])
    assert page.errors == []


def test_the_gallery_is_sorted_and_filtered(run_directory, page):
    page.size(1280, 20_000)  # a window in which all cards have content
    page.open(run_directory / "report.html")
    data = embedded((run_directory / "report.html").read_text())
    scores, labels = np.array(data["scores"]), np.array(data["labels"])
    names, defects = np.array(data["names"]), np.array(data["defects"])
    called = scores > data["threshold"]

    def shown():
        page.settle()
        return page.run(f"{SHOWN}.map(item => item.querySelector('.name').textContent)")

    def choose(selector, value):
        page.run(
            f"(() => {{const s = document.querySelector({json.dumps(selector)});"
            f"s.value = {json.dumps(value)};"
            "s.dispatchEvent(new Event('change', {bubbles: true}))})()"
        )

    order = np.argsort(-scores, kind="stable")
    assert shown() == names[order].tolist()
    choose("#order", "low")
    assert shown() == names[order[::-1]].tolist()
    choose("#order", "high")
    wanted = {"fp": called & (labels == 0), "fn": ~called & (labels == 1)}
    wanted["correct"] = called == (labels == 1)
    for value, of in wanted.items():
        page.run(f"document.querySelector('[name=verdict][value={value}]').click()")
        assert shown() == [names[i] for i in order if of[i]]
        assert page.run(f"document.getElementById('chip-{value}').textContent") == str(of.sum())
    choose("#defect", HOSTILE[1])
    assert shown() == [names[i] for i in order if of[i] and defects[i] == HOSTILE[1]]
    assert page.run("typeof hacked") == "undefined"
    page.run("document.querySelector('[name=verdict][value=\"\"]').click()")
    page.run("document.querySelector('.card').click()")
    first = next(i for i in order if defects[i] == HOSTILE[1])
    assert page.run("document.getElementById('detail-title').textContent") == names[first]
    assert page.run("document.querySelectorAll('#detail-panels img').length") == 4
    page.run("document.getElementById('next').click()")
    assert page.run("document.getElementById('detail-title').textContent") != names[first]
    page.size(1280, 900)
    assert page.errors == []


def test_only_images_near_the_window_are_in_the_page(many, page):
    page.requests.clear()
    page.open(many / "report.html")
    assert page.run(f"{SHOWN}.length") == 2000
    filled = f"{SHOWN}.map((item, i) => item.firstChild ? i : -1).filter(i => i >= 0)"
    pictures = "document.images.length"
    page.run("document.getElementById('gallery').scrollIntoView({behavior: 'instant'})")
    page.settle()
    before = page.run(filled)
    assert before[0] == 0
    assert 8 <= len(before) < 100
    assert page.run(pictures) == 4 * len(before)
    page.run("window.scrollTo({top: document.body.scrollHeight, behavior: 'instant'})")
    page.settle()
    after = page.run(filled)
    assert after[-1] == 1999
    assert after[0] > before[-1]
    assert page.run(pictures) < 400
    assert page.run("[...document.images].every(image => image.complete && image.naturalWidth)")
    assert all(url.startswith(("file:", "data:")) for url in page.requests)
    assert page.errors == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_narrow_windows(run_directory, page, width):
    page.size(width, 800, mobile=width < 1000)
    page.open(run_directory / "report.html")
    assert page.run("document.documentElement.scrollWidth") <= width
    page.run("document.getElementById('gallery').scrollIntoView({behavior: 'instant'})")
    page.settle()
    cards = "[...document.querySelectorAll('.card')]"
    assert page.run(f"{cards}.length") > 4
    assert page.run(f"{cards}.every(card => card.scrollHeight <= card.clientHeight)")
    page.size(1280, 900)


def test_a_run_directory_inside_another_keeps_its_report(tmp_path):
    outer, inner = tmp_path / "run", tmp_path / "run" / "inner"
    page = write_run(inner, [write_part(inner, "brass nut", n=9)])
    write_run(outer, [write_part(outer, "screw", n=9)])
    assert (inner / "report.html").read_text() == page
    assert "brass nut" not in (outer / "report.html").read_text()
    for file in (inner / "a" / "part.json", outer / "a" / "part.json"):
        file.parent.mkdir()
        file.touch()
    own = [outer / "a" / "part.json", outer / "part.json"]
    assert files_in(outer, "part.json") == own
    assert len(files_in(inner, "part.json")) == 2


def test_a_heat_map_with_too_long_a_name_is_skipped_with_a_warning(tmp_path, caplog):
    source, scored, maps = scored_images(6)
    names = (f"{'x' * 252}.png", *source.names[1:])  # 256 bytes
    source = dataclasses.replace(source, names=names)
    draw(tmp_path, source, scored, maps, heatmaps=6, strips=6)
    assert "xxx.png cannot be written" in caplog.text
    assert len(list((tmp_path / "heatmaps").rglob("*.png"))) == 5
    assert len(json.loads((tmp_path / "scores.json").read_text())["images"]) == 6
