"use strict";
// The page: images, the list of their results, and events.

const SIDE = 640; // longer side of a stored map in pixels
const THUMB = 112;
const MOST = 200; // results that are kept
const FORM_BYTES = 1000; // upper bound of a request without its file
const STATES = { waiting: "Waiting", sending: "Being scored", failed: "Not scored" };

const find = (id) => document.getElementById(id);
let results = []; // newest first, see `addResult`, `preview` and `fill` for their fields
let selected = null;
let numbers = 0;

/** An element with properties and children. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Images

/** Adds image files, which are scored by the chosen model. */
function add(files) {
  const added = [...files].map((file) =>
    addResult({ file, page: 1, isPage: false, name: file.name || "image" }),
  );
  results = [...added, ...results];
  for (const old of results.splice(MOST)) remove(old);
  if (!added.length) return;
  select(added[0]);
  showAll();
  for (const result of added) score(result);
}

/** A result without a score; `page` is the number of its page, if its file has several. */
function addResult(given) {
  const known = { id: ++numbers, model: model.name, state: "waiting", message: "" };
  const result = { ...known, marked: null, isMarking: false, markProblem: "", ...given };
  result.item = make("li", {
    id: `result-${result.id}`,
    role: "option",
    onclick: () => select(result),
  });
  return result;
}

function remove(result) {
  result.state = "removed";
  if (result.url) URL.revokeObjectURL(result.url);
  if (selected === result) selected = null;
}

/** Changes fields of a result, and shows them. */
function change(result, fields) {
  Object.assign(result, fields);
  paint(result);
  if (result === selected) showView();
}

/** Sends an image when its turn comes. */
function score(result) {
  change(result, { state: "waiting", message: "" });
  schedule(async () => {
    if (result.state === "removed") return;
    change(result, { state: "sending" });
    try {
      if (result.file.size > maxBytes - FORM_BYTES)
        throw new Error(
          `The file has more bytes than the server reads, ${maxBytes}. Send a smaller one.`,
        );
      await Promise.all([preview(result), predict(result)]);
    } catch (error) {
      if (result.state !== "removed")
        Object.assign(result, { state: "failed", message: error.message });
    }
    finished(result);
  });
}

/** Scores a file; its further pages become results of their own. */
async function predict(result) {
  const body = new FormData();
  body.append("files", result.file, result.file.name || "image");
  const onWait = (seconds) =>
    change(result, { message: `The server is busy. Sent again in ${seconds} s.` });
  const path = `v1/predict?map=png16&model=${encodeURIComponent(result.model)}`;
  const { predictions } = await ask(path, { method: "POST", body, onWait });
  if (result.state === "removed") return;
  if (predictions[0].version !== models.get(result.model).version) {
    await readModels();
    showModel();
  }
  await fill(result, predictions[result.page - 1]);
  if (result.isPage || predictions.length === 1) return;
  result.isPage = true;
  const others = predictions
    .slice(1)
    .map((_, i) => addResult({ file: result.file, page: i + 2, isPage: true, name: "" }));
  results.splice(results.indexOf(result) + 1, 0, ...others);
  await Promise.all(others.map((other, i) => fill(other, predictions[i + 1])));
}

async function fill(result, found) {
  const { zero, full, data } = found.anomaly_map;
  const decoded = await decodePng16(data);
  const map = reduced(decoded, SIDE);
  map.values = Float32Array.from(map.levels, (level) => zero + ((full - zero) * level) / 65535);
  Object.assign(result, {
    ...{ name: found.name, score: found.score, p: found.p_value, version: found.version },
    ...{ map, size: [decoded.width, decoded.height], state: "done", message: "" },
  });
  result.thumb ??= thumbOf(heatOf(result), ...result.size);
}

/** Draws the small image of a file, if the browser can read it. */
async function preview(result) {
  if (result.url !== undefined || result.page > 1) return;
  result.url = null;
  try {
    const bitmap = await createImageBitmap(result.file);
    const size = [bitmap.width, bitmap.height];
    const thumb = thumbOf(bitmap, ...size);
    bitmap.close();
    if (result.state !== "removed")
      change(result, { size, thumb, url: URL.createObjectURL(result.file) });
  } catch {
    // The server may read it nevertheless, such as TIFF.
  }
}

/** A square cut from the middle of an image. */
function thumbOf(image, width, height) {
  const side = Math.min(width, height);
  const [thumb, context] = canvas(THUMB, THUMB, true);
  const scale = THUMB / side;
  context.imageSmoothingQuality = "high";
  context.drawImage(
    image,
    (THUMB - width * scale) / 2,
    (THUMB - height * scale) / 2,
    width * scale,
    height * scale,
  );
  return thumb;
}

function finished(result) {
  const open = shown().filter(({ state }) => state === "waiting" || state === "sending").length;
  if (result.state === "removed") return;
  showAll();
  if (result === selected) showView();
  const failed = shown().filter(({ state }) => state === "failed").length;
  const also = failed ? ` ${failed} cannot be scored.` : "";
  find("status").textContent = open
    ? `${open} of ${shown().length} images are waiting.`
    : `${summary(result)}${also}`;
}

const summary = (result) =>
  result.state === "failed"
    ? `${result.name}: ${result.message}`
    : `${result.name}: ${verdictOf(result).toLowerCase()}, score ${text(result.score)}.`;

function verdictOf(result) {
  const anomalous = isAnomalous(result);
  return anomalous === null ? "No decision" : anomalous ? "Anomalous" : "Normal";
}

// The list

/** Shows everything that depends on the results or the threshold. */
function showAll() {
  const list = shown();
  document.body.classList.toggle("empty", !results.length);
  const items = list.map(({ item }) => item);
  if (
    items.length !== find("results").children.length ||
    items.some((item, i) => item !== find("results").children[i])
  ) {
    find("results").replaceChildren(...items);
  }
  list.forEach(paint);
  const anomalous = list.filter((result) => result.state === "done" && isAnomalous(result)).length;
  find("count").textContent = list.length
    ? `${list.length}${anomalous ? `, ${anomalous} anomalous` : ""}`
    : "";
  if (!list.length)
    find("status").textContent = results.length ? "No image was scored by this model yet." : "";
  showThreshold();
  showTaught();
}

/** Draws the list item of a result. */
function paint(result) {
  const { item, state } = result;
  const anomalous = state === "done" ? isAnomalous(result) : null;
  item.className = [state, anomalous === null ? "" : anomalous ? "anomalous" : "normal"].join(" ");
  item.ariaSelected = String(result === selected);
  const image = result.thumb ?? make("span", { className: "blank" });
  const line = STATES[state] ?? verdictOf(result);
  const what = make(
    "span",
    { className: "what" },
    make("span", { className: "name", textContent: result.name, title: result.name }),
    make("span", { className: "line", textContent: result.message || line }),
  );
  if (result.marked)
    what.lastChild.append(make("span", { className: "flag", textContent: "false alarm" }));
  const children = [image, what];
  if (state === "done") {
    const { threshold } = models.get(result.model);
    const difference = threshold === null ? "" : signed(result.score - threshold);
    children.push(
      make(
        "span",
        { className: "numbers" },
        make("span", { textContent: text(result.score) }),
        make("span", {
          className: "difference",
          textContent: difference,
          title: "Difference to the threshold",
        }),
      ),
    );
  }
  item.replaceChildren(...children);
  for (const name of ["score", "p", "state", "version"]) item.dataset[name] = result[name] ?? "";
  item.dataset.isAnomalous = anomalous ?? "";
}

function select(result) {
  const before = selected;
  selected = result;
  if (before && before !== result) paint(before);
  if (!result) {
    find("results").removeAttribute("aria-activedescendant");
  } else {
    paint(result);
    find("results").setAttribute("aria-activedescendant", result.item.id);
    const [list, item] = [find("results"), result.item];
    if (item.offsetTop < list.scrollTop) list.scrollTop = item.offsetTop;
    else if (item.offsetTop + item.offsetHeight > list.scrollTop + list.clientHeight) {
      list.scrollTop = item.offsetTop + item.offsetHeight - list.clientHeight;
    }
  }
  showView();
  showThreshold();
}

/** Selects a result by its distance from the selected one. */
function move(step) {
  const list = shown();
  if (!list.length) return;
  const i = list.indexOf(selected) + step;
  select(list[Math.min(list.length - 1, Math.max(0, i))]);
}

// Events

/** Files of a drop, with those in its directories. */
async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.());
  if (!entries.some((entry) => entry?.isDirectory)) return [...transfer.files];
  const found = [];
  const visit = async (entry) => {
    if (entry.isFile)
      return void found.push(await new Promise((done, fail) => entry.file(done, fail)));
    const reader = entry.createReader();
    for (
      let batch;
      (batch = await new Promise((done, fail) => reader.readEntries(done, fail))).length;
    ) {
      for (const each of batch) await visit(each);
    }
  };
  for (const entry of entries) if (entry) await visit(entry);
  return found.filter(({ name }) => !name.startsWith("."));
}

const KEYS = {
  f: toggleMark,
  h: () => setOpacity(opacity ? 0 : 70),
  o: () => find("outlined").click(),
  r: reset,
  c: () => find("camera").click(),
};
const STEPS = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };
const ENDS = { Home: -Infinity, End: Infinity }; // in the list only

function onKey(event) {
  const isTyping = event.target.closest(
    "input:not([type=checkbox], [type=file]), select, textarea",
  );
  if (
    event.ctrlKey ||
    event.altKey ||
    event.metaKey ||
    isTyping ||
    document.querySelector("dialog[open]")
  )
    return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const step = STEPS[key] ?? (event.target === find("results") ? ENDS[key] : undefined);
  if (step !== undefined && shown().length) {
    event.preventDefault();
    move(step);
  } else if (key in KEYS && find("shortcuts").checked && !event.repeat) {
    KEYS[key]();
  }
}

function listen() {
  find("files").onchange = (event) => {
    add(event.target.files);
    event.target.value = "";
  };
  for (const name of ["dragover", "dragleave", "drop"]) {
    addEventListener(name, async (event) => {
      event.preventDefault();
      find("drop").classList.toggle("over", name === "dragover");
      if (name === "drop") add(await filesOf(event.dataTransfer));
    });
  }
  addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) add(files);
  });
  addEventListener("keydown", onKey);
  find("camera").onclick = () => openCamera(add);
  find("camera-close").onclick = () => find("camera-dialog").close();
  find("camera-dialog").onclose = closeCamera;
  find("previous").onclick = () => move(-1);
  find("next").onclick = () => move(1);
  find("again").onclick = () => score(selected);
  find("mark").onclick = toggleMark;
  find("reset").onclick = reset;
  find("clear").onclick = () => {
    shown().forEach(remove);
    results = results.filter(({ state }) => state !== "removed");
    showAll();
    select(null);
  };
  find("copy").onclick = async () => {
    await navigator.clipboard.writeText(model.false_alarms.command);
    find("copy").textContent = "Copied";
  };
  find("model").onchange = (event) => {
    model = models.get(event.target.value);
    showModel();
    showAll();
    select(shown()[0] ?? null);
  };
  find("slider").oninput = (event) => {
    model.threshold = Number(event.target.value);
    showAll();
    showDecision();
  };
  find("pixel").oninput = (event) => {
    model.pixel_threshold = Number(event.target.value);
    showThreshold();
    showOutline();
    showDecision();
  };
  find("opacity").oninput = (event) => setOpacity(Number(event.target.value));
  find("outlined").onchange = showOutline;
}

/** Starts the page; resolves when images can be added. */
async function start() {
  try {
    await readModels();
  } catch (error) {
    find("problem").hidden = false;
    find("problem").textContent = error.message;
    return;
  }
  showModel();
  listen();
  showAll();
  showView();
  document.body.classList.add("ready");
}

const ready = start();
