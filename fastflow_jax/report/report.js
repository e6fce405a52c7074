"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const { scores, labels } = data;
  const all = scores.map((_, i) => i);
  const VERDICTS = { tp: "found", fn: "missed", fp: "false alarm", tn: "passed" };
  let threshold = data.threshold;

  const text = (value) => value.toFixed(data.digits);
  const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
  const verdict = (i) => (scores[i] > threshold ? (labels[i] ? "tp" : "fp") : labels[i] ? "fn" : "tn");
  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // Gallery: one list item per image; only items near the window have content.
  const gallery = $("gallery");
  const pictured = all.filter((i) => data.strips[i]);
  const items = new Map(pictured.map((i) => [i, make("li")]));
  const index = new Map([...items].map(([i, item]) => [item, i]));
  let shown = [];

  function panels(i) {
    const [width, height] = data.sizes[i];
    return data.panels.map((panel, k) => {
      const image = make("img", {
        src: `data:image/webp;base64,${data.strips[i]}`,
        alt: panel,
        className: width >= height ? "wide" : "tall",
      });
      image.style.setProperty("--at", `${(100 * k) / (data.panels.length - 1)}%`);
      image.style.setProperty("--w", width);
      image.style.setProperty("--h", height);
      return make("div", { className: "panel" }, image);
    });
  }

  function fill(item) {
    if (item.firstChild) return;
    const i = index.get(item);
    const caption = make(
      "div",
      { className: "caption" },
      make("span", {}, make("span", { textContent: data.defects[i] }), make("span", { className: "verdict", textContent: VERDICTS[verdict(i)] })),
      make("span", {}, make("span", { className: "name", textContent: data.names[i], title: data.names[i] }), make("span", { textContent: text(scores[i]) })),
    );
    const card = make("button", { type: "button", className: "card" }, make("div", { className: "panels" }, ...panels(i)), caption);
    card.addEventListener("click", () => open(i));
    item.append(card);
  }

  const observer = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (isIntersecting) fill(target);
        else if (!target.contains(document.activeElement)) target.replaceChildren();
      }
    },
    { rootMargin: "600px 0px" },
  );
  for (const item of items.values()) observer.observe(item);

  const chosen = () => document.querySelector("[name=verdict]:checked").value;

  function arrange() {
    const order = $("order").value;
    const defect = $("defect").value;
    const wanted = chosen();
    const key = {
      high: (i) => -scores[i],
      low: (i) => scores[i],
      overlap: (i) => data.aupimo[i] ?? 2,
      near: (i) => Math.abs(scores[i] - threshold),
    }[order];
    const now = pictured
      .filter((i) => !defect || data.defects[i] === defect)
      .filter((i) => {
        const each = verdict(i);
        return !wanted || each === wanted || (wanted === "correct" && (each === "tp" || each === "tn"));
      })
      .sort((a, b) => key(a) - key(b));
    if (now.length !== shown.length || now.some((i, place) => i !== shown[place])) {
      shown = now;
      gallery.replaceChildren(...shown.map((i) => items.get(i)));
    }
    $("empty").hidden = shown.length > 0;
  }

  function count() {
    const counts = { tp: 0, fn: 0, fp: 0, tn: 0 };
    for (const i of all) counts[verdict(i)] += 1;
    const { tp, fn, fp, tn } = counts;
    const of = (part, whole) => [`${part}`, make("small", { textContent: `of ${whole}` })];
    $("tp").replaceChildren(...of(tp, tp + fn));
    $("fn").replaceChildren(...of(fn, tp + fn));
    $("fp").replaceChildren(...of(fp, fp + tn));
    $("tn").replaceChildren(...of(tn, fp + tn));
    $("recall").textContent = percent(tp, tp + fn);
    const both = tp + fn > 0 && fp + tn > 0; // with one class, they do not depend on the scores
    $("precision").textContent = both ? percent(tp, tp + fp) : "–";
    $("alarms").textContent = percent(fp, fp + tn);
    $("f1").textContent = both ? ((2 * tp) / (2 * tp + fp + fn)).toFixed(3) : "–";
    const point = $("point");
    if (point) {
      const svg = point.ownerSVGElement;
      const place = (axis, rate) => {
        const [start, length] = svg.dataset[axis].split(" ").map(Number);
        return start + length * rate;
      };
      point.setAttribute("cx", place("x", fp / (fp + tn)));
      point.setAttribute("cy", place("y", tp / (tp + fn)));
    }
    return `Threshold ${text(threshold)}: ${tp} found, ${fn} missed, ${fp} false alarms, ${tn} passed.`;
  }

  // Chips show the number of images per verdict, of the selected defect.
  function chips() {
    const defect = $("defect").value;
    const counts = { all: 0, tp: 0, fn: 0, fp: 0, tn: 0 };
    for (const i of pictured) {
      if (defect && data.defects[i] !== defect) continue;
      counts.all += 1;
      counts[verdict(i)] += 1;
    }
    for (const name of ["all", "fp", "fn"]) $(`chip-${name}`).textContent = counts[name];
    $("chip-correct").textContent = counts.tp + counts.tn;
  }

  let spoken;
  function show() {
    const place = (threshold - data.low) / (data.high - data.low);
    $("cut").style.left = `${100 * Math.min(1, Math.max(0, place))}%`;
    $("slider").setAttribute("aria-valuetext", text(threshold));
    const sentence = count();
    clearTimeout(spoken);
    spoken = setTimeout(() => ($("spoken").textContent = sentence), 400);
    if (!gallery) return;
    for (const [i, item] of items) {
      const now = verdict(i);
      if (item.dataset.verdict === now) continue;
      item.dataset.verdict = now;
      const tag = item.querySelector(".verdict");
      if (tag) tag.textContent = VERDICTS[now];
    }
    chips();
    arrange();
  }

  function set(value, from) {
    threshold = value;
    if (from !== $("slider")) $("slider").value = value;
    if (from !== $("number")) $("number").value = text(value);
    show();
  }

  $("slider").addEventListener("input", (event) => set(Number(event.target.value), event.target));
  $("slider").addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -20, PageUp: 20 }[event.key];
    if (!steps) return;
    event.preventDefault();
    const next = threshold + (steps * (data.high - data.low)) / 500;
    set(Math.min(data.high, Math.max(data.low, next)));
  });
  $("number").addEventListener("input", (event) => {
    if (Number.isFinite(event.target.valueAsNumber)) set(event.target.valueAsNumber, event.target);
  });
  $("reset").addEventListener("click", () => set(data.threshold));

  // Dialog with one image.
  let opened;
  function open(i) {
    opened = i;
    $("detail-title").textContent = data.names[i];
    $("detail-text").textContent = `${data.defects[i]}, score ${text(scores[i])}: ${VERDICTS[verdict(i)]}`;
    if (data.aupimo[i] !== null) $("detail-text").textContent += `, AUPIMO ${data.aupimo[i].toFixed(3)}`;
    const figures = panels(i).map((panel, k) => make("figure", {}, panel, make("figcaption", { textContent: data.panels[k] })));
    $("detail-panels").replaceChildren(...figures);
    const place = shown.indexOf(i);
    $("previous").disabled = place <= 0;
    $("next").disabled = place >= shown.length - 1;
    if (!$("detail").open) $("detail").showModal();
  }
  const turn = (step) => {
    const next = shown[shown.indexOf(opened) + step];
    if (next !== undefined) open(next);
  };

  if (gallery) {
    for (const name of ["change", "reset"]) document.querySelector(".filters").addEventListener(name, () => (chips(), arrange()));
    document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
    $("previous").addEventListener("click", () => turn(-1));
    $("next").addEventListener("click", () => turn(1));
    $("detail").addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) turn(step);
    });
    window.addEventListener("beforeprint", () => shown.slice(0, 24).forEach((i) => fill(items.get(i))));
  }
  set(threshold);
})();
