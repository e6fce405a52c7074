"use strict";
// Anomaly maps in colours and outlines of masks, of exported pages and the page of the server.

const OUTLINE = [0, 255, 170, 255];
const OPACITY = 0.85; // of the highest value
// Nine points of matplotlib's "inferno" (CC0), as in the heat maps of reports.
const INFERNO = "000004 1f0c48 550f6d 88226a ba3655 e35933 f98c0a f9c932 fcffa4"
  .split(" ")
  .map((hex) => [0, 2, 4].map((i) => Number.parseInt(hex.slice(i, i + 2), 16)));

/** A canvas with a drawing context; without alpha, transparent pixels are black. */
function canvas(width, height, alpha) {
  const element = document.createElement("canvas");
  Object.assign(element, { width, height });
  return [element, element.getContext("2d", { alpha, willReadFrequently: true })];
}

/** A canvas with an anomaly map in colours from `low` to `high`, more opaque at higher values. */
function heat(map, width, height, low, high) {
  const [element, context] = canvas(width, height, true);
  const picture = context.createImageData(width, height);
  for (let i = 0; i < map.length; i++) {
    const value = Math.min(1, Math.max(0, (map[i] - low) / (high - low || 1)));
    const place = value * (INFERNO.length - 1);
    const [from, to] = [INFERNO[Math.floor(place)], INFERNO[Math.ceil(place)]];
    for (let k = 0; k < 3; k++) picture.data[4 * i + k] = from[k] + (to[k] - from[k]) * (place % 1);
    picture.data[4 * i + 3] = 255 * OPACITY * value;
  }
  context.putImageData(picture, 0, 0);
  return element;
}

/** A canvas with the outline of the pixels of a map that are anomalous, `side` on its longer side. */
function outline(isAnomalous, width, height, side) {
  const scale = side / Math.max(width, height);
  const size = [width, height].map((n) => Math.max(1, Math.floor(n * scale)));
  const [element, context] = canvas(...size, true);
  const picture = context.createImageData(...size);
  const inside = (x, y) =>
    x >= 0 &&
    y >= 0 &&
    x < size[0] &&
    y < size[1] &&
    isAnomalous(Math.floor(y / scale) * width + Math.floor(x / scale));
  for (let y = 0, i = 0; y < size[1]; y++) {
    for (let x = 0; x < size[0]; x++, i += 4) {
      const isEdge =
        inside(x, y) &&
        !(inside(x - 2, y) && inside(x + 2, y) && inside(x, y - 2) && inside(x, y + 2));
      if (isEdge) picture.data.set(OUTLINE, i);
    }
  }
  context.putImageData(picture, 0, 0);
  return element;
}
