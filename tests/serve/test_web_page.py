"""The page of the server in a browser: scores, threshold, false alarms, camera, token, keyboard."""

import base64
import contextlib
import http.client
import io
import json

import chromium
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

TOKEN = "sécret"
READY = "document.readyState === 'complete' && document.body.classList.contains('ready')"
CAMERA = "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"
SECONDS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Directory of false alarms."""
    return tmp_path_factory.mktemp("marked")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Image files by name: grey levels with noise, and pages that browsers cannot show."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    made = {}
    for name, level in (("dark", 60), ("bright", 170), ("brighter", 210)):
        pixels = rng.integers(level - 40, level + 40, (16, 24, 3), np.uint8)
        made[name] = Image.fromarray(pixels)
        made[name].save(folder / f"{name}.png")
    first, second = made["dark"].copy(), made["bright"].copy()
    first.save(folder / "pages.tiff", save_all=True, append_images=[second])
    (folder / "notes.txt").write_text("no image")
    (folder / "large.png").write_bytes(bytes(10**5 + 1))
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def server(started_server, file, export, folder, tmp_path_factory):
    other = export(tmp_path_factory.mktemp("other") / "other.onnx", offset=0.3)
    models = {"tiny": str(file), "other": str(other)}
    how = f"port=0, max_bytes=10**5, false_alarms={str(folder)!r}, token={TOKEN!r}"
    with started_server(f"{models!r}, {how}") as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not chromium.BINARY:
        pytest.skip("Chromium was not found")
    with chromium.page(tmp_path_factory.mktemp("chromium"), *CAMERA) as page:
        page.size(1280, 900)
        yield page


@pytest.fixture
def page(browser, server):
    """The page, open and without images."""
    browser.size(1280, 900)
    browser.errors.clear()
    browser.requests.clear()
    browser.open(f"http://127.0.0.1:{server.port}/")
    until(browser, f"entered || {READY}")
    if browser.run("entered !== null"):  # in the first test
        browser.run(f"find('token').value = {TOKEN!r}; find('token-form').requestSubmit()")
        until(browser, READY)
    return browser


def until(page, condition):
    """Waits until an expression of the page is true."""
    assert page.run(f"""new Promise(done => {{
      const end = Date.now() + {1000 * SECONDS};
      const look = () => ({condition}) ? done(true) : Date.now() > end ? done(false)
        : setTimeout(look, 20);
      look();
    }})"""), condition


ITEMS = "[...document.querySelectorAll('#results li')]"


def scored(page, *files):
    """Chooses files, and returns the data of all items when none is waiting."""
    page.choose("#files", files)
    until(
        page, f"{ITEMS}.length && {ITEMS}.every(i => ['done', 'failed'].includes(i.dataset.state))"
    )
    return page.run(f"{ITEMS}.map(item => ({{...item.dataset, text: item.innerText}}))")


def shown(page, selector):
    return page.run(f"document.querySelector({selector!r})?.innerText")


def ask(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}".encode()})
        return json.loads(connection.getresponse().read())


def test_images_are_scored_as_by_the_api(page, server, images):
    files = [images[name] for name in ("dark", "bright", "brighter")]
    for found, file in zip(scored(page, *files), files, strict=True):
        path = "/v1/predict?model=tiny&mask=png"
        expected = ask(server.port, "POST", path, file.read_bytes())
        assert float(found["score"]) == expected["score"]
        assert float(found["p"]) == expected["p_value"]
        assert found["isAnomalous"] == str(expected["is_anomalous"]).lower()
        assert found["text"].startswith(file.name)
        page.run(f"select(results.find(({{ name }}) => name === {file.name!r}))")
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(expected["mask"])))) > 0
        part = page.run("""(() => {
          const { values } = selected.map;
          return values.filter(value => value > model.pixel_threshold).length / values.length;
        })()""")
        assert part == mask.mean()
    assert mask.any()
    assert shown(page, "#file") == "brighter.png"
    assert shown(page, "#verdict") == "Anomalous"


@pytest.mark.parametrize("noise", [0, 1, 1000])
def test_maps_are_decoded_exactly(page, noise):
    """Encoders choose another filter for rows of another kind."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:40, :30]
    levels = (50 * x * x + 20 * x * y + 900 * (y % 5)).astype(np.int64)
    levels = (levels + rng.integers(0, noise + 1, levels.shape)).astype(np.uint16)
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "PNG")
    text = base64.b64encode(content.getvalue()).decode()
    found = page.run(f"decodePng16('{text}').then(map => ({{...map, levels: [...map.levels]}}))")
    assert (found["width"], found["height"]) == (30, 40)
    assert found["levels"] == levels.ravel().tolist()
    small = page.run(f"decodePng16('{text}').then(map => [...reduced(map, 20).levels])")
    assert len(small) == 15 * 20
    assert max(small) == levels.max()


def test_dropped_images_are_scored(page, images):
    data = list(images["bright"].read_bytes())
    page.run(f"""(() => {{
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array({data})], "dropped.png"));
      dispatchEvent(new DragEvent("drop", {{ dataTransfer: transfer, cancelable: true }}));
    }})()""")
    until(page, f"{ITEMS}[0]?.dataset.state === 'done'")
    assert shown(page, "#results li").startswith("dropped.png\nAnomalous")
    assert page.run("document.querySelector('#stage img').naturalWidth") == 24
    assert page.run("document.querySelector('#stage .heat').width") == 24


def slide(page, selector, value):
    page.run(f"""(() => {{
      const slider = document.querySelector({selector!r});
      slider.value = {value};
      slider.dispatchEvent(new Event("input"));
    }})()""")


def test_the_threshold_changes_decisions_on_the_page_only(page, server, images):
    (found,) = scored(page, images["bright"])
    assert found["isAnomalous"] == "true"
    assert "at most 20 % of normal images" in shown(page, "#rate")
    slide(page, "#slider", 0.7)
    assert page.run(f"{ITEMS}[0].dataset.isAnomalous") == "false"
    assert shown(page, "#verdict") == "Normal"
    assert "The server still decides at 0.500" in shown(page, "#server-level")
    slide(page, "#slider", 0.25)
    assert "at most 60 % of normal images" in shown(page, "#rate")
    assert ask(server.port, "GET", "/v1/models")["models"][0]["threshold"] == 0.5
    page.key("r")
    assert page.run(f"{ITEMS}[0].dataset.isAnomalous") == "true"
    assert shown(page, "#level") == "0.500"


def test_the_pixel_threshold_changes_the_outline(page, images):
    scored(page, images["bright"])
    opaque = """document.querySelector('.outline').getContext('2d')
      .getImageData(0, 0, 800, 533).data.filter((value, i) => i % 4 === 3 && value).length"""
    assert page.run(opaque) == 0
    part = shown(page, "#facts")
    slide(page, "#pixel", 0.6)
    assert page.run(opaque) > 1000
    assert shown(page, "#facts") != part
    page.key("o")
    assert page.run("document.querySelector('.outline')") is None
    page.key("h")
    assert page.run("document.querySelector('.heat').style.opacity") == "0"


def test_false_alarms_are_stored_and_taken_back(page, images, folder):
    scored(page, images["dark"], images["bright"])
    assert page.run("find('mark').hidden")  # the first image is normal
    page.key("ArrowDown")
    page.key("f")
    until(page, "selected.marked")
    (stored,) = (folder / "tiny").iterdir()
    assert stored.read_bytes() == images["bright"].read_bytes()
    assert shown(page, "#taught-title") == "1 false alarm is stored"
    assert f"--input={folder / 'tiny'} --keep_threshold" in shown(page, "#command")
    assert "false alarm" in page.run(f"{ITEMS}[1].innerText")
    page.run("find('mark').click()")
    until(page, "selected.marked === null")
    assert not [*(folder / "tiny").iterdir()]
    assert page.run("find('taught').hidden")


def test_the_keyboard_moves_through_the_results(page, images):
    scored(page, images["dark"], images["bright"], images["brighter"])

    def selected():
        chosen = f"{ITEMS}.filter(item => item.ariaSelected === 'true').map(item => item.id)"
        active = page.run("find('results').getAttribute('aria-activedescendant')")
        assert page.run(chosen) == [active]
        return shown(page, "#file").partition(".")[0]

    found = [selected()]
    page.run("find('results').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp", "Home", "End"):
        page.key(key)
        found.append(selected())
    assert found == ["dark", "bright", "brighter", "brighter", "bright", "dark", "brighter"]
    page.run("find('shortcuts').click()")
    page.key("h")
    assert page.run("document.querySelector('.heat').style.opacity") == "0.7"
    page.run("find('slider').focus()")
    page.key("ArrowUp")
    assert selected() == "brighter"


def test_files_that_cannot_be_scored_have_one_line(page, images):
    bad, large, fine = scored(page, images["notes"], images["large"], images["dark"])
    assert bad["text"].startswith("notes.txt\nnotes.txt is not an image that Pillow can read")
    assert large["text"].startswith(
        "large.png\nThe file has more bytes than the server reads, 100000."
    )
    assert fine["state"] == "done"
    assert shown(page, "#note").startswith("notes.txt is not an image")


def test_pages_have_a_result_each(page, images):
    first, second = scored(page, images["pages"])
    assert first["text"].startswith("pages.tiff#1\nNormal")
    assert second["text"].startswith("pages.tiff#2\nAnomalous")
    page.key("ArrowDown")
    page.run("find('again').click()")
    until(page, "selected.state === 'done'")
    assert page.run("selected.name") == "pages.tiff#2"
    assert page.run("String(selected.score)") == second["score"]
    assert shown(page, "#note") == "This browser cannot show the image itself, only its heat map."


def test_busy_and_lost_servers(page, images):
    page.run("""
      const headers = { "Retry-After": "0.1" };
      window.answers = [() => Response.json({}, { status: 503, headers })];
      window.real = window.fetch;
      window.fetch = async (...request) => (answers.shift() ?? (() => real(...request)))();
    """)
    (found,) = scored(page, images["dark"])
    assert found["state"] == "done"
    page.run("answers.push(() => { throw new TypeError('lost'); }); find('again').click()")
    until(page, "selected.state === 'failed'")
    assert shown(page, "#note").startswith("The connection to the server was lost.")
    page.run("find('again').click()")
    until(page, "selected.state === 'done'")
    assert page.run("find('note').hidden")


def test_models_have_their_own_results(page, images):
    scored(page, images["dark"])
    page.run("find('model').value = 'other'; find('model').onchange({ target: find('model') })")
    assert page.run(f"{ITEMS}.length") == 0
    (found,) = scored(page, images["dark"])
    assert float(found["score"]) == pytest.approx(float(page.run("results[1].score")) + 0.3)
    assert shown(page, "h1") == "other"


def test_the_camera_captures_an_image(page):
    page.run("find('camera').click()")
    until(page, "!find('capture').disabled")
    page.run("window.track = stream.getTracks()[0]; find('capture').click()")
    until(page, f"{ITEMS}[0]?.dataset.state")
    until(page, "track.readyState === 'ended' && !find('camera-dialog').open")
    assert shown(page, "#results .name").startswith("camera ")
    page.run("""Object.defineProperty(navigator, "mediaDevices", { value: undefined });
      find("camera").click()""")
    until(page, "find('camera-message').textContent.includes('https and localhost')")


@pytest.mark.parametrize("dark", [False, True])
def test_a_telephone_needs_no_horizontal_scrolling(page, images, dark):
    page.size(390, 844, dark=dark, mobile=True)
    width = "document.documentElement.scrollWidth"
    assert page.run(width) <= 390
    scored(page, images["bright"], images["notes"])
    assert page.run(width) <= 390
    page.run("document.querySelector('details').open = true; find('camera').click()")
    assert page.run(width) <= 390


def test_nothing_is_requested_from_elsewhere(page, server, images):
    scored(page, images["dark"])
    own = f"http://127.0.0.1:{server.port}/"
    assert {url.removeprefix("blob:")[: len(own)] for url in page.requests} == {own}
    assert not page.errors
    blocked = page.run(f"fetch('http://localhost:{server.port}/').then(() => 0, () => 1)")
    assert blocked
    assert page.errors  # of the content security policy
    inline = "document.body.append(make('script', { textContent: 'window.inline = 1' }))"
    assert page.run(f"{inline}, window.inline") is None


def test_the_token_is_asked_for_and_kept(page, images):
    address = page.run("sessionStorage.clear(), location.href")
    page.open(address)
    for given, message in (("wrong", "needs its token"), (TOKEN, "is wrong")):
        until(page, f"find('token-message').textContent.includes({message!r})")
        page.run(f"find('token').value = {given!r}; find('token-form').requestSubmit()")
    until(page, READY)
    (found,) = scored(page, images["dark"])
    assert found["state"] == "done"
    page.open(address)
    until(page, READY)


def test_the_files_of_the_page_keep_it_from_loading_others(client):
    for path, kind in (
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/theme.css", "text/css"),
    ):
        response = client.get(path)
        assert response.headers["content-type"].startswith(kind)
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        policy = response.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= {*policy}
        assert "unsafe" not in " ".join(policy)
