"use strict";
// The models of the server, the levels that this page decides with, and numbers as text.

const models = new Map(); // by name: as the server describes them, with the levels of this page
let model = null; // that is chosen
let maxBytes = Infinity; // of a request

/** Reads the models; levels that were not moved follow those of the server. */
async function readModels() {
  const answer = await ask("v1/models");
  maxBytes = answer.max_bytes;
  for (const found of answer.models) {
    const known = models.get(found.name);
    const kept = (name) =>
      known && known[name] !== known.served[name] ? known[name] : found[name];
    models.set(found.name, {
      ...found,
      served: found,
      threshold: kept("threshold"),
      pixel_threshold: kept("pixel_threshold"),
    });
  }
  model = models.get(model?.name ?? answer.models[0].name);
}

function showModel() {
  const { metadata, version, name } = model;
  const parts = [metadata.detector, metadata.backbone].filter(Boolean).join(" on ");
  document.title = `${name} · fastflow-jax`;
  find("title").textContent = name;
  find("about").textContent = [parts, `version ${version}`].filter(Boolean).join(" · ");
  find("chooser").hidden = models.size < 2;
  find("model").replaceChildren(
    ...[...models.keys()].map((each) => new Option(each, each, false, each === name)),
  );
}

/** Results of the chosen model, newest first. */
const shown = () => results.filter((result) => result.model === model.name);

const isAnomalous = ({ score, model: name }) => {
  const { threshold } = models.get(name);
  return threshold === null ? null : score > threshold;
};

/** Lowest and highest value of the slider; much higher scores are at its end. */
function range() {
  const { served, held_out: heldOut } = model;
  const known = [served.threshold, ...(heldOut?.thresholds ?? [])].filter(
    (value) => value !== null,
  );
  const scores = shown().flatMap(({ score }) => (score === undefined ? [] : [score]));
  const all = [...known, ...scores];
  if (!all.length) return [0, 1];
  let [low, high] = [Math.min(...all), Math.max(...all)];
  if (known.length) {
    const [highest, span] = [Math.max(...known), Math.max(...known) - Math.min(...known) || 1];
    high = Math.min(Math.max(high, highest + span / 2), highest + 3 * span);
  }
  const margin = 0.04 * (high - low || 1);
  return [low - margin, high + margin];
}

/** A number with as many decimals as the range of scores needs. */
function text(value) {
  const [low, high] = range();
  return decimal(value, high - low);
}

const decimal = (value, span) =>
  value.toFixed(Math.min(9, Math.max(0, 2 - Math.floor(Math.log10(span))))).replace("-", "−");

const signed = (value) => (value > 0 ? `+${text(value)}` : text(value));

/** The expected share of normal images above a threshold; null without held-out images. */
function rateOf(threshold) {
  const heldOut = model.held_out;
  if (!heldOut) return null;
  const above = heldOut.thresholds.findIndex((each) => each > threshold);
  const i = (above < 0 ? heldOut.thresholds.length : above) - 1;
  return i < 0 ? 1 : heldOut.rates[i];
}

const percent = (share) => `${Number((100 * share).toPrecision(2))} %`;
