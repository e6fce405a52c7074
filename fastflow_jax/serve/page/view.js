"use strict";
// The large view of one result, and false alarms.

const OUTLINE_SIDE = 800; // longer side of an outline in pixels
let opacity = 70; // of the heat map, in per cent

/** The anomaly map of a result in colours. */
function heatOf({ map, model: name }) {
  const [low, high] = coloursOf(name, map);
  return heat(map.values, map.width, map.height, low, high);
}

const coloursOf = (name, map) =>
  models.get(name).colour_range ?? [0, map.values.reduce((a, b) => Math.max(a, b), 0)];

function showView() {
  const list = shown();
  const i = list.indexOf(selected);
  find("view").classList.toggle("nothing", i < 0);
  find("previous").disabled = i <= 0;
  find("next").disabled = i < 0 || i === list.length - 1;
  if (i < 0) {
    find("file").textContent = "No image is selected";
    find("stage").replaceChildren();
    find("stage").hidden = false;
  } else {
    find("file").textContent = selected.name;
    showStage();
  }
  showDecision();
}

/** Shows the selected image with its heat map and outline. */
function showStage() {
  const { map, size, url, name, state } = selected;
  const stage = find("stage");
  stage.className = state;
  stage.hidden = state === "failed" && !url;
  const [width, height] = size ?? [4, 3];
  stage.style.setProperty("--ratio", width / height);
  const layers = [];
  if (url) layers.push(make("img", { src: url, alt: name, draggable: false }));
  if (map) {
    const overlay = heatOf(selected);
    overlay.className = "heat";
    overlay.style.opacity = opacity / 100;
    overlay.role = "img";
    overlay.ariaLabel = `Heat map of ${name}`;
    layers.push(overlay);
  }
  stage.replaceChildren(...layers);
  showOutline();
}

function setOpacity(value) {
  opacity = value;
  const overlay = document.querySelector(".heat");
  if (overlay) overlay.style.opacity = opacity / 100;
  showDecision();
}

/** Draws the outline of the pixels above the pixel threshold. */
function showOutline() {
  const stage = find("stage");
  stage.querySelector(".outline")?.remove();
  const level = model.pixel_threshold;
  if (!selected?.map || level === null || !find("outlined").checked) return;
  const { values, width, height } = selected.map;
  const drawing = outline((i) => values[i] > level, width, height, OUTLINE_SIDE);
  drawing.className = "outline";
  drawing.role = "img";
  drawing.ariaLabel = `Outline of the pixels above ${decimal(level, level || 1)}`;
  stage.append(drawing);
}

/** Shows what depends on the threshold, but not the image. */
function showDecision() {
  const isShown = selected?.state === "done" && selected.model === model.name;
  const anomalous = isShown ? isAnomalous(selected) : null;
  const verdict = find("verdict");
  verdict.className = `verdict ${anomalous === null ? "" : anomalous ? "anomalous" : "normal"}`;
  verdict.textContent = isShown ? verdictOf(selected) : (STATES[selected?.state] ?? "");
  for (const id of ["facts", "looks"]) find(id).hidden = !isShown;
  find("actions").hidden = !isShown && selected?.state !== "failed";
  showNote();
  if (!isShown) {
    find("mark").hidden = true;
    find("mark-note").textContent = "";
    return;
  }
  const { threshold } = model;
  const values = [["Score", text(selected.score)]];
  if (threshold !== null) {
    const difference = selected.score - threshold;
    values.push([
      difference > 0 ? "Above threshold" : "Below threshold",
      text(Math.abs(difference)),
    ]);
  }
  if (selected.p !== null) values.push(["p-value", selected.p.toPrecision(2)]);
  if (model.pixel_threshold !== null) {
    const above = selected.map.values.reduce((n, value) => n + (value > model.pixel_threshold), 0);
    values.push(["Anomalous pixels", percent(above / selected.map.values.length)]);
  }
  find("facts").replaceChildren(
    ...values.map(([name, value]) =>
      make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })),
    ),
  );
  showLooks();
  showMark(anomalous);
}

function showNote() {
  let note = selected?.state === "failed" ? selected.message : "";
  if (selected?.state === "done" && !selected.url)
    note = "This browser cannot show the image itself, only its heat map.";
  if (selected?.state === "done" && selected.version !== models.get(selected.model).version) {
    note = "Scored by an earlier version of the model. Score it again to compare.";
  }
  find("note").hidden = !note;
  find("note").textContent = note;
  find("note").className = selected?.state === "failed" ? "problem" : "note";
}

function showLooks() {
  find("opacity").value = opacity;
  find("opacity-value").textContent = `${opacity} %`;
  const level = model.pixel_threshold;
  find("pixels").hidden = level === null;
  if (level === null) return;
  const [low, high] = coloursOf(model.name, selected.map);
  const [from, to] = [Math.min(low, level), Math.max(high, level)];
  setRange(find("pixel"), from, to, level);
  find("pixel-value").textContent = decimal(level, to - from);
}

function setRange(slider, low, high, value) {
  Object.assign(slider, { min: low, max: high, step: (high - low) / 1000 || 1, value });
}

function showMark(anomalous) {
  const { marked, isMarking } = selected;
  const isStored = model.false_alarms !== null;
  find("mark").hidden = !isStored || selected.isPage || !(anomalous || marked);
  find("mark").disabled = isMarking;
  find("mark-text").textContent = marked ? "Undo false alarm" : "Mark as false alarm";
  let note = selected.markProblem;
  if (!isStored && anomalous)
    note = "To mark false alarms here, start the server with --false_alarms=DIR.";
  if (isStored && anomalous && selected.isPage)
    note = "To mark this page, save it as a file of its own.";
  find("mark-note").textContent = note;
}

/** Marks the selected image as a false alarm, or takes that back. */
async function toggleMark() {
  const result = selected;
  if (find("mark").hidden || !result || result.isMarking) return;
  const of = models.get(result.model);
  const query = `?model=${encodeURIComponent(result.model)}`;
  Object.assign(result, { isMarking: true, markProblem: "" });
  showDecision();
  try {
    const answer = result.marked
      ? await ask(`v1/false_alarms/${result.marked}${query}`, { method: "DELETE" })
      : await ask(`v1/false_alarms${query}`, { method: "POST", body: result.file });
    result.marked = answer.name ?? null;
    of.false_alarms.images = answer.images;
    find("status").textContent =
      `${result.name}: ${answer.name ? "marked as a false alarm" : "not marked any more"}.`;
  } catch (error) {
    result.markProblem = error.message;
  }
  result.isMarking = false;
  paint(result);
  showDecision();
  showTaught();
}

function showTaught() {
  const marked = model.false_alarms;
  find("taught").hidden = !marked?.images;
  if (!marked?.images) return;
  find("taught-title").textContent =
    marked.images === 1 ? "1 false alarm is stored" : `${marked.images} false alarms are stored`;
  const flags = marked.command
    .split(/ (?=--)/)
    .flatMap((flag) => [make("span", { textContent: flag }), " "]);
  find("command").replaceChildren(...flags);
  find("copy").textContent = "Copy";
  find("copy").hidden = !navigator.clipboard; // on http, other than localhost
}
