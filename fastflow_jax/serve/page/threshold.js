"use strict";
// The threshold of image scores: slider, false-alarm rate and scores on its scale.

const SVG = "http://www.w3.org/2000/svg";

function drawn(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function showThreshold() {
  const { threshold, served } = model;
  find("cut").hidden = threshold === null || !shown().length;
  if (threshold === null) return;
  const [low, high] = range();
  setRange(find("slider"), low, high, threshold);
  find("slider").ariaValueText = text(threshold);
  find("level").textContent = text(threshold);
  const rate = rateOf(threshold);
  const images = model.held_out?.images;
  find("rate").textContent =
    rate === null
      ? "The model has no held-out images, so the false-alarm rate is unknown."
      : `Expected false alarms: at most ${percent(rate)} of normal images, by ${images} held-out images.`;
  const isMoved =
    threshold !== served.threshold || model.pixel_threshold !== served.pixel_threshold;
  find("server-level").textContent = isMoved
    ? `Changed on this page only. The server still decides at ${text(served.threshold)}.`
    : "The threshold of the server. Moving the slider changes this page only.";
  find("reset").hidden = !isMoved;
  showStrip(low, high);
}

/** Draws held-out scores, results and the threshold on the scale of the slider. */
function showStrip(low, high) {
  const place = (value) =>
    `${(100 * Math.min(1, Math.max(0, (value - low) / (high - low)))).toFixed(2)}%`;
  const marks = (model.held_out?.thresholds ?? []).map((value) =>
    drawn("line", { class: "held-out", x1: place(value), x2: place(value), y1: 36, y2: 44 }),
  );
  const stacks = new Map();
  const dots = [];
  for (const result of shown().toReversed()) {
    if (result.state !== "done") continue;
    const column = Math.round((60 * (result.score - low)) / (high - low));
    const n = stacks.get(column) ?? 0;
    stacks.set(column, n + 1);
    const dot = drawn("circle", {
      cx: place(result.score),
      cy: 28 - 7 * Math.min(n, 3),
      r: result === selected ? 5 : 3.5,
    });
    dot.setAttribute(
      "class",
      `${isAnomalous(result) ? "anomalous" : "normal"}${result === selected ? " selected" : ""}`,
    );
    dots.push(dot);
  }
  dots.sort((a, b) => a.classList.contains("selected") - b.classList.contains("selected"));
  const cut = drawn("line", {
    class: "level",
    x1: place(model.threshold),
    x2: place(model.threshold),
    y1: 0,
    y2: 48,
  });
  find("strip").replaceChildren(...marks, cut, ...dots);
}

function reset() {
  Object.assign(model, {
    threshold: model.served.threshold,
    pixel_threshold: model.served.pixel_threshold,
  });
  showAll();
  if (selected) showOutline();
  showDecision();
}
