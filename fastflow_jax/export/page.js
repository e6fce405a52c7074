const SIDE = 640; // longer side of a shown image in pixels
const find = id => document.getElementById(id);
const about = JSON.parse(find("about").textContent);

/** Bytes of an embedded file, which is compressed by gzip and written in base64. */
async function unpacked(id) {
  const text = atob(find(id).textContent);
  find(id).remove();
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Starts ONNX Runtime; returns a function from image data to the outputs of the model by name. */
async function loaded() {
  const script = new Blob([await unpacked("script")], { type: "text/javascript" });
  const ort = await import(URL.createObjectURL(script));
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1; // pages from disk have no threads
  ort.env.wasm.wasmBinary = await unpacked("wasm");
  const session = await ort.InferenceSession.create(await unpacked("model"), {
    executionProviders: ["wasm"],
    logSeverityLevel: 3,
  });
  return async ({ data, width, height }) => {
    const rgb = new Uint8Array(width * height * 3);
    for (let i = 0, j = 0; i < data.length; i += 4) {
      rgb[j++] = data[i];
      rgb[j++] = data[i + 1];
      rgb[j++] = data[i + 2];
    }
    const outputs = await session.run({ images: new ort.Tensor("uint8", rgb, [1, height, width, 3]) });
    return Object.fromEntries(Object.entries(outputs).map(([name, tensor]) => [name, tensor.data]));
  };
}

/** Pixels of an image file, turned by its EXIF orientation, without its colour profile. */
async function decoded(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  const [, context] = canvas(bitmap.width, bitmap.height, false);
  context.drawImage(bitmap, 0, 0);
  return [bitmap, context.getImageData(0, 0, bitmap.width, bitmap.height)];
}

/** The pictures of an image: itself, and its map on top. */
function pictures(name, bitmap, outputs) {
  const scale = SIDE / Math.max(bitmap.width, bitmap.height);
  const size = [bitmap.width, bitmap.height].map(n => Math.max(1, Math.floor(n * scale)));
  const figure = document.createElement("div");
  figure.className = "pictures";
  const [image, below] = canvas(...size, false);
  below.drawImage(bitmap, 0, 0, ...size);
  const [overlay, above] = canvas(...size, true);
  overlay.className = "map";
  const { anomaly_map: map, mask } = outputs;
  const [low, high] = about.colour_range ?? [0, map.reduce((a, b) => Math.max(a, b))];
  above.drawImage(heat(map, bitmap.width, bitmap.height, low, high), 0, 0, ...size);
  if (mask) above.drawImage(outline((i) => mask[i], bitmap.width, bitmap.height, SIDE), 0, 0);
  image.role = overlay.role = "img";
  image.ariaLabel = name;
  overlay.ariaLabel = `Anomaly map of ${name}`;
  figure.append(image, overlay);
  return figure;
}

/** Adds texts to an element: a description list of names and values. */
function described(values) {
  const list = document.createElement("dl");
  for (const [name, value] of Object.entries(values)) {
    const [term, definition] = ["dt", "dd"].map(tag => document.createElement(tag));
    [term.textContent, definition.textContent] = [name, value];
    list.append(term, definition);
  }
  return list;
}

/** Scores a file and shows the result, which the attributes `data-...` have in full precision. */
async function inspect(file, score) {
  const entry = document.createElement("li");
  const heading = document.createElement("h2");
  heading.textContent = file.name;
  entry.append(heading);
  find("results").append(entry);
  let bitmap, pixels;
  try {
    [bitmap, pixels] = await decoded(file);
  } catch {
    entry.append("This file cannot be read. Convert it to PNG or JPEG.");
    return;
  }
  const outputs = await score(pixels);
  const [value, p] = [outputs.score[0], outputs.p_value?.[0]];
  entry.dataset.score = value;
  const values = { Score: value.toPrecision(5) };
  if (p !== undefined) {
    entry.dataset.pValue = p;
    values["p-value"] = p.toPrecision(3);
  }
  if (outputs.is_anomalous) {
    const isAnomalous = Boolean(outputs.is_anomalous[0]);
    entry.dataset.isAnomalous = isAnomalous;
    entry.dataset.maskPixels = outputs.mask?.reduce((sum, pixel) => sum + pixel, 0) ?? "";
    heading.append(isAnomalous ? ": anomalous" : ": normal");
    heading.classList.toggle("anomalous", isAnomalous);
  }
  entry.append(pictures(file.name, bitmap, outputs), described(values));
  bitmap.close();
}

let queue = loaded();
queue.then(() => {
  find("files").disabled = false;
  find("status").textContent = "Ready.";
}, error => {
  find("status").textContent = `The model cannot be loaded (${error.message}). Use a current browser.`;
});

/** Scores files after those that were added before. */
function add(files) {
  queue = queue.then(async score => {
    for (const [i, file] of files.entries()) {
      find("status").textContent = `Image ${i + 1} of ${files.length} ...`;
      await new Promise(requestAnimationFrame);
      await inspect(file, score).catch(error => {
        find("results").lastElementChild.append(`This image cannot be scored (${error.message}).`);
      });
    }
    find("status").textContent = "Ready.";
    return score;
  });
}

find("files").onchange = event => {
  add([...event.target.files]);
  event.target.value = "";
};
find("overlay").onchange = event => find("results").classList.toggle("plain", !event.target.checked);
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, event => {
    event.preventDefault();
    find("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") add([...event.dataTransfer.files]);
  });
}
