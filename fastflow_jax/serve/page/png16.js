"use strict";
// Anomaly maps as the server sends them: PNG files of 16 bits, which browsers reduce to 8.

/** Levels of a grey PNG of 16 bits without interlacing, given in base64. */
async function decodePng16(text) {
  const binary = atob(text);
  const bytes = Uint8Array.from({ length: binary.length }, (_, i) => binary.charCodeAt(i));
  const view = new DataView(bytes.buffer);
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  const parts = [];
  for (let at = 8; at < bytes.length; at += 12 + view.getUint32(at)) {
    const kind = binary.slice(at + 4, at + 8);
    if (kind === "IDAT") parts.push(bytes.subarray(at + 8, at + 8 + view.getUint32(at)));
  }
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = new Uint8Array(await new Response(stream).arrayBuffer());
  return { width, height, levels: unfiltered(rows, width, height) };
}

/** Undoes the filter of each row; the first byte of a row names it. */
function unfiltered(rows, width, height) {
  const length = 2 * width;
  const levels = new Uint16Array(width * height);
  let [above, row] = [new Uint8Array(length), new Uint8Array(length)];
  for (let y = 0; y < height; y++) {
    const start = y * (length + 1);
    const filter = rows[start];
    for (let x = 0; x < length; x++) {
      const left = x < 2 ? 0 : row[x - 2];
      const corner = x < 2 ? 0 : above[x - 2];
      const predicted =
        [0, left, above[x], (left + above[x]) >> 1][filter] ?? paeth(left, above[x], corner);
      row[x] = rows[start + 1 + x] + predicted;
    }
    for (let x = 0; x < width; x++) levels[y * width + x] = 256 * row[2 * x] + row[2 * x + 1];
    [above, row] = [row, above];
  }
  return levels;
}

/** The one of three neighbours that is nearest to left + up - corner. */
function paeth(left, up, corner) {
  const [a, b, c] = [
    Math.abs(up - corner),
    Math.abs(left - corner),
    Math.abs(left + up - 2 * corner),
  ];
  return a <= b && a <= c ? left : b <= c ? up : corner;
}

/** Reduces a map to at most `side` pixels on its longer side; each keeps the highest level. */
function reduced({ width, height, levels }, side) {
  const factor = Math.max(1, Math.max(width, height) / side);
  const [w, h] = [width, height].map((n) => Math.max(1, Math.round(n / factor)));
  const highest = new Uint16Array(w * h);
  for (let y = 0, i = 0; y < height; y++) {
    const row = Math.floor((y * h) / height) * w;
    for (let x = 0; x < width; x++, i++) {
      const at = row + Math.floor((x * w) / width);
      if (levels[i] > highest[at]) highest[at] = levels[i];
    }
  }
  return { width: w, height: h, levels: highest };
}
