"use strict";
// Draws the page of one or several runs from the JSON beside it. Whatever it shows of a run goes in as text, never as HTML.
const SVG = "http://www.w3.org/2000/svg";
let data = JSON.parse(document.getElementById("data").textContent);
const live = data.live;
const view = { axis: "steps", smooth: 4, from: 0, hidden: new Set(), cursor: null };
const charts = new Map();

// Small helpers ---------------------------------------------------------------------------------------------------------
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "own") element.style.setProperty("--own", value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}
function s(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
const colour = (number) => `var(--run${number % 6})`;
const there = (value) => value !== null && value !== undefined && Number.isFinite(value);
function figures(value) {
  if (!there(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(1).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}
const percent = (value, places = 1) => (there(value) ? `${(100 * value).toFixed(places)} %` : "–");
const counted = (value) => Math.round(value).toLocaleString("en");
function duration(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.round(seconds % 60)} s` : `${figures(seconds)} s`;
}
function ago(seconds) { return seconds < 90 ? `${Math.max(0, Math.round(seconds))} s` : duration(60 * Math.round(seconds / 60)); }

// What there is to draw -------------------------------------------------------------------------------------------------
const KNOWN = {
  loss: ["All losses", "by their weights"], lr: ["Learning rate", ""], grad_norm: ["Gradient norm", "before clipping", "log"],
  samples_per_s: ["Throughput", "samples per second"], tokens_per_s: ["Tokens", "per second"],
  tflops_per_device: ["Computed", "TFLOP/s a device"], mfu: ["Use of the device's peak", "share", "share"],
  step_s: ["Time of a step", "seconds"], data_wait_share: ["Waiting for data", "share of the time", "share"],
  memory_gb: ["Peak memory", "GB, first process"], skipped: ["Skipped steps", "share of the steps", "share"],
  replaced_samples: ["Replaced samples", "a step"],
};
const GROUPS = [
  ["learning", "What is learnt", "Below the dashed line, the entropy of the targets, a model reads the context: knowing only how often each target occurs scores the line itself.",
    (name) => name === "loss" || name.startsWith("loss_")],
  ["accuracy", "How often it is right", "The dashed line is the share of the most frequent target.", (name) => name.startsWith("acc_")],
  ["scores", "Held-out scores", "What validations score beside losses and accuracies.", null],
  ["steering", "Learning rate and gradient", "", (name) => ["lr", "grad_norm"].includes(name)],
  ["speed", "Speed and memory", "", (name) => ["samples_per_s", "tokens_per_s", "step_s", "data_wait_share", "memory_gb", "tflops_per_device", "mfu"].includes(name)],
  ["samples", "Skipped steps and replaced samples", "", (name) => ["skipped", "replaced_samples"].includes(name)],
  ["targets", "Entropy of the targets", "Of the steps that are measured, in nats. Near 0 all targets are one, and nothing is learnt from them.",
    (name) => name.startsWith("entropy_")],
  ["more", "More", "", (name) => !["data_wait_s", "step"].includes(name)],
];
function titled(name) {
  const found = named(name);
  return { ...found, title: found.title[0].toUpperCase() + found.title.slice(1) };
}
function named(name) {
  const loss = name.replace(/^(loss|acc|entropy)_/, "");
  const kind = data.runs.map((run) => (run.losses || {})[loss]).find(Boolean);
  if (KNOWN[name]) return { title: KNOWN[name][0], unit: KNOWN[name][1], form: KNOWN[name][2] || "" };
  const title = kind ? kind.title : (loss === name ? name : loss).replaceAll("_", " ");
  if (name.startsWith("acc_")) return { title, unit: "accuracy", form: "share" };
  if (name.startsWith("entropy_")) return { title, unit: "nats", form: "" };
  return { title, unit: kind ? (kind.nats ? `nats per ${kind.unit}` : kind.unit) : "", form: "" };
}
function specs() {
  const trained = new Set(data.runs.flatMap((run) => Object.keys(run.train.fields)));
  const scored = new Set(data.runs.flatMap((run) => Object.keys(run.held_out.fields)));
  const taken = new Set();
  const result = new Map(GROUPS.map(([id]) => [id, []]));
  for (const [id, , , wants] of GROUPS) {
    for (const name of wants ? trained : scored) {
      if (taken.has(name) || (wants ? !wants(name) : trained.has(name) || ["step", "loss"].includes(name))) continue;
      taken.add(name);
      if (["skipped", "replaced_samples"].includes(name) && !data.runs.some((run) => (run.train.fields[name]?.mean ?? []).some((y) => y > 0))) continue; // the cards say 0
      result.get(id).push({ name, ...titled(name) });
    }
  }
  const losses = result.get("learning");
  if (losses.length === 2) losses.shift(); // the only loss is the whole
  return result;
}
function bound(run, name) {
  if (name.startsWith("acc_")) return (run.baselines || {})[name.slice(4)];
  if (!name.startsWith("loss_")) return undefined;
  const own = name.slice(5), measured = (run.entropies || {})[own];
  if (there(measured)) return measured;
  const field = run.train.fields[`entropy_${own}`];
  const known = field ? field.mean.filter(there) : [];
  return known.length ? known.reduce((a, b) => a + b) / known.length : undefined;
}

// A chart ---------------------------------------------------------------------------------------------------------------
const LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 22;
function runningMean(values, window) {
  const result = [], kept = [];
  let sum = 0;
  for (const value of values) {
    if (!there(value)) { result.push(null); continue; }
    kept.push(value); sum += value;
    if (kept.length > window) sum -= kept.shift();
    result.push(sum / kept.length);
  }
  return result;
}
function nice(low, high, number) {
  const rough = (high - low) / number, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough) || rough;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}
function powers(low, high) {
  const ticks = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
    for (const m of high / low > 30 ? [1] : [1, 2, 5]) if (m * 10 ** p >= low && m * 10 ** p <= high) ticks.push(m * 10 ** p);
  return ticks;
}
function placesOf(run, kind) {
  // Where the points of a curve lie on the axis; validations know only their steps.
  const train = run.train, own = run[kind];
  if (view.axis === "steps" || kind === "train") return own[view.axis];
  return own.steps.map((step) => {
    const i = train.steps.findIndex((end) => end >= step);
    return train[view.axis][i < 0 ? train.steps.length - 1 : i];
  });
}
class Chart {
  constructor(spec) {
    this.spec = spec;
    this.heading = h("h3", {}, spec.title);
    this.unit = h("span", { class: "unit" }, spec.unit);
    this.plot = h("div", { class: "plot", tabindex: "0", role: "img" });
    this.values = h("div", { class: "values", "aria-hidden": "true" });
    this.element = h("figure", { class: "card chart", "data-field": spec.name }, h("figcaption", {}, this.heading, this.unit), this.plot, this.values);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerdown", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") moveCursor(null); });
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("focus", () => { if (view.cursor === null) moveCursor(this.range[1]); this.say(); });
    this.plot.addEventListener("blur", () => moveCursor(null));
    watch.observe(this.plot);
  }
  lines() {
    const { name } = this.spec;
    return data.runs.flatMap((run, number) => {
      const trained = run.train.fields[name], scored = run.held_out.fields[name];
      if (view.hidden.has(number) || (!trained && !scored)) return [];
      const xs = placesOf(run, "train"), window = Math.max(1, Math.round(view.smooth / 100 * xs.length));
      // A number that is measured now and then only is drawn as it is.
      const sparse = trained && trained.mean.filter(there).length < 0.7 * xs.length;
      const raw = trained ? trained.mean : [];
      return [{
        run, number, xs, raw, low: trained && trained.low, high: trained && trained.high, smooth: sparse ? raw : runningMean(raw, window),
        heldX: scored ? placesOf(run, "held_out") : [], held: scored ? scored.mean : [], bound: bound(run, name),
      }];
    });
  }
  draw() {
    const width = this.plot.clientWidth, height = this.plot.clientHeight;
    if (!width) return;
    const lines = this.lines(), ends = lines.flatMap((l) => [l.xs.at(-1), l.heldX.at(-1)]).filter(there);
    const last = Math.max(...ends, 0) || 1, first = view.from * last;
    this.range = [first, last];
    this.drawn = lines;
    const within = (x) => x >= first && x <= last;
    let values = [];
    for (const l of lines) {
      values.push(...l.raw.filter((y, i) => there(y) && within(l.xs[i])), ...l.held.filter((y, i) => there(y) && within(l.heldX[i])));
      if (there(l.bound)) values.push(l.bound);
    }
    const log = this.spec.form === "log" && values.length && Math.min(...values) > 0;
    let low = values.length ? values.reduce((a, b) => Math.min(a, b)) : 0, high = values.length ? values.reduce((a, b) => Math.max(a, b)) : 1;
    if (this.spec.form === "share" || this.spec.name === "replaced_samples") low = 0;
    if (["samples_per_s", "tokens_per_s", "memory_gb", "step_s", "lr", "tflops_per_device"].includes(this.spec.name)) low = Math.min(0, low);
    if (high === low) { high += Math.abs(high) * 0.1 || 1; if (low !== 0) low -= Math.abs(low) * 0.1; }
    const scale = log ? Math.log10 : (y) => y, room = 0.05 * (scale(high) - scale(low));
    const bottom = low === 0 ? 0 : scale(low) - room, top = scale(high) + room;
    const px = (x) => LEFT + (x - first) / (last - first) * (width - LEFT - RIGHT);
    const py = (y) => TOP + (top - scale(y)) / (top - bottom) * (height - TOP - BOTTOM);
    this.px = px; this.py = py;
    const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true", focusable: "false" });
    const clip = `clip-${this.spec.name.replace(/[^\w-]/g, "_")}`, defs = s("defs", {}), area = s("clipPath", { id: clip });
    area.append(s("rect", { x: LEFT, y: 0, width: width - LEFT - RIGHT + 4, height: height - BOTTOM + 1 }));
    defs.append(area); svg.append(defs);
    for (const y of log ? powers(low, high) : nice(low, high, 4)) {
      svg.append(s("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: py(y), y2: py(y) }));
      svg.append(s("text", { x: LEFT - 7, y: py(y) + 4, "text-anchor": "end" }, this.spec.form === "share" ? percent(y, high < 0.03 ? 1 : 0) : figures(y)));
    }
    svg.append(s("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: height - BOTTOM, y2: height - BOTTOM }));
    for (const x of nice(first, last, Math.max(2, Math.floor(width / 95)))) {
      const anchor = px(x) > width - 30 ? "end" : "middle";
      svg.append(s("text", { x: px(x), y: height - 6, "text-anchor": anchor }, short(x)));
    }
    const inside = s("g", { "clip-path": `url(#${clip})` });
    svg.append(inside);
    for (const l of lines) {
      const own = `color: ${colour(l.number)}`;
      for (const stretch of l.run.stretches.slice(1)) {
        const x = px(at(l.run, stretch.after));
        inside.append(s("line", { class: "restart", x1: x, x2: x, y1: TOP, y2: height - BOTTOM }));
      }
      if (l.low) {
        const over = l.xs.map((x, i) => [x, l.high[i]]).filter(([, y]) => there(y)), under = l.xs.map((x, i) => [x, l.low[i]]).filter(([, y]) => there(y)).reverse();
        inside.append(tinted(s("path", { class: "band", d: path([...over, ...under].map(([x, y]) => [px(x), Math.max(-1e4, Math.min(1e4, py(log ? Math.max(y, low) : y)))])) + "Z" }), l.number, "fill"));
      }
      if (l.raw !== l.smooth && l.smooth.length > 1) inside.append(tinted(s("path", { class: "raw", d: this.trace(l.xs, l.raw) }), l.number, "stroke"));
      inside.append(tinted(s("path", { class: "mean", d: this.trace(l.xs, l.smooth) }), l.number, "stroke"));
      if (l.xs.length === 1 && there(l.raw[0])) inside.append(tinted(s("circle", { cx: px(l.xs[0]), cy: py(l.raw[0]), r: 3 }), l.number, "fill"));
      if (there(l.bound)) inside.append(tinted(s("path", { class: "bound", d: `M${LEFT} ${py(l.bound)}H${width - RIGHT}` }), l.number, "stroke"));
    }
    for (const l of lines) {
      l.held.forEach((y, i) => { if (there(y) && within(l.heldX[i])) svg.append(tinted(s("circle", { class: "held", cx: px(l.heldX[i]), cy: py(y), r: l.held.length > 60 ? 2.4 : 4 }), l.number, "fill")); });
      if (l.held.length && !l.raw.length) inside.append(tinted(s("path", { class: "mean", d: this.trace(l.heldX, l.held) }), l.number, "stroke"));
    }
    this.line = s("line", { class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
    svg.append(this.line);
    this.plot.replaceChildren(svg);
    this.plot.setAttribute("aria-label", this.described());
    this.showCursor();
  }
  trace(xs, ys) { return path(xs.map((x, i) => [x, ys[i]]).filter(([, y]) => there(y)).map(([x, y]) => [this.px(x), this.py(y)])); }
  form(y) { return this.spec.form === "share" ? percent(y) : figures(y); }
  described() {
    const told = this.drawn.map((l) => {
      const known = l.smooth.filter(there), held = l.held.filter(there), words = [];
      if (known.length) words.push(`from ${this.form(l.raw.find(there))} to ${this.form(known.at(-1))}`);
      if (held.length) words.push(`held-out ${this.form(held.at(-1))}`);
      if (there(l.bound)) words.push(this.spec.name.startsWith("acc_") ? `most frequent target ${this.form(l.bound)}` : `entropy of the targets ${this.form(l.bound)}`);
      return `${l.run.name}: ${words.join(", ")}`;
    });
    return `${this.spec.title}${this.spec.unit ? `, ${this.spec.unit}` : ""}. ${told.join("; ")}. Arrow keys read the values.`;
  }
  point(event) {
    const box = this.plot.getBoundingClientRect(), [first, last] = this.range;
    const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    moveCursor(first + Math.max(0, Math.min(1, share)) * (last - first));
  }
  key(event) {
    const [first, last] = this.range, step = (last - first) / (event.shiftKey ? 10 : 50);
    const to = { ArrowLeft: -step, ArrowRight: step, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") { moveCursor(null); return; }
    if (to === undefined) return;
    event.preventDefault();
    moveCursor(Math.max(first, Math.min(last, (view.cursor ?? last) + to)));
    this.say();
  }
  say() {
    clearTimeout(saying);
    saying = setTimeout(() => { document.getElementById("said").textContent = `${this.spec.title}, ${axisWord()} ${short(view.cursor ?? this.range[1])}: ${this.values.textContent}`; }, 200);
  }
  showCursor() {
    if (!this.px) return;
    const at = view.cursor, shown = at !== null && at >= this.range[0] && at <= this.range[1];
    this.line.setAttribute("visibility", shown ? "visible" : "hidden");
    if (shown) { this.line.setAttribute("x1", this.px(at)); this.line.setAttribute("x2", this.px(at)); }
    this.values.replaceChildren(...this.drawn.map((l) => {
      const several = data.runs.length > 1, i = known(l.smooth, nearest(l.xs, shown ? at : Infinity)), j = known(l.held, nearest(l.heldX, shown ? at : Infinity)), told = [];
      if (there(l.smooth[i])) told.push(h("b", {}, this.form(l.smooth[i])));
      if (there(l.held[j])) told.push(`${told.length ? " · " : ""}held-out `, h("b", {}, this.form(l.held[j])));
      return h("span", { own: colour(l.number) }, h("i", {}), several ? `${l.run.name} ` : "", ...told);
    }), shown ? `${axisWord()} ${short(at)}` : "");
  }
}
let saying = 0;
const watch = new ResizeObserver((entries) => { for (const entry of entries) charts.get(entry.target.parentElement.dataset.field)?.draw(); });
function tinted(element, number, what) { element.style[what] = colour(number); return element; }
function path(points) { return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join(""); }
function at(run, step) {
  if (view.axis === "steps") return step;
  const i = run.train.steps.findIndex((end) => end >= step);
  return i < 0 ? Infinity : run.train[view.axis][i];
}
function nearest(xs, x) {
  if (x === Infinity) return xs.length - 1;
  let low = 0, high = xs.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle + 1; else high = middle; }
  return low > 0 && Math.abs(xs[low - 1] - x) < Math.abs(xs[low] - x) ? low - 1 : low;
}
function known(ys, i) {
  while (i > 0 && !there(ys[i])) i--; // what is measured now and then is shown until the next time
  return i;
}
function short(x) {
  if (view.axis === "hours") return x >= 1 || x === 0 ? `${figures(x)} h` : `${figures(60 * x)} min`;
  if (x >= 1e6) return `${Number((x / 1e6).toPrecision(4))}M`;
  return x >= 1e4 ? `${Number((x / 1e3).toPrecision(4))}k` : counted(x);
}
const axisWord = () => ({ steps: "step", hours: "after", samples: "samples" })[view.axis];
let moving = 0;
function moveCursor(to) {
  view.cursor = to;
  cancelAnimationFrame(moving);
  moving = requestAnimationFrame(() => charts.forEach((chart) => chart.showCursor()));
}
function redraw() { charts.forEach((chart) => chart.draw()); }

// Parts of the page -----------------------------------------------------------------------------------------------------
function fact(name, value, kind) { return value === null ? [] : h("div", {}, h("dt", {}, name), h("dd", { class: kind || null }, value)); }
function runCard(run, number) {
  const total = Object.values(run.samples).reduce((a, b) => a + b, 0), box = h("input", { type: "checkbox", "aria-label": `show ${run.name}` });
  box.checked = !view.hidden.has(number);
  box.addEventListener("change", () => { view.hidden[box.checked ? "delete" : "add"](number); redraw(); });
  const restarts = run.stretches.length - 1;
  return h("article", { class: "card run", own: colour(number) },
    h("header", {}, data.runs.length > 1 ? h("label", {}, box, h("span", { class: "swatch" }), run.name) : h("strong", {}, run.name)),
    h("progress", { max: run.planned || 1, value: run.step, "aria-label": "steps done" }),
    h("p", {}, run.step ? `${counted(run.step)} of ${counted(run.planned)} steps` : "no step yet: curves come with the first one"),
    run.gone ? h("p", { class: "bad" }, "its folder is gone: this is what it held") : [],
    h("dl", { class: "facts" },
      fact("time of all steps", run.step ? duration(run.seconds) : null),
      fact("samples", total ? counted(total) : null),
      fact("samples per second", run.seconds ? figures(total / run.seconds) : null),
      fact("waiting for data", run.seconds ? percent(run.waited / run.seconds) : null),
      fact("peak memory", there(run.memory_gb) ? `${figures(run.memory_gb)} GB` : null),
      fact("skipped steps", counted(run.skipped_count), run.skipped_count ? "bad" : ""),
      fact("replaced samples", counted(run.replaced_count), run.replaced_count ? "bad" : ""),
      fact("restarts", String(Math.max(0, restarts)))),
    h("p", { class: "where" }, run.folder, run.computes ? ` · ${run.computes}` : ""));
}
function table(head, rows, kind) {
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": head.join(", ") },
    h("table", { class: kind || null }, h("thead", {}, h("tr", {}, head.map((cell) => h("th", { scope: "col" }, cell)))), h("tbody", {}, rows)));
}
function row(first, cells, own) { return h("tr", {}, h("th", { scope: "row", own }, first), cells.map((cell) => (cell instanceof Node ? cell : h("td", {}, cell)))); }
function verdict(value, line) {
  const cell = h("td", {}, figures(value));
  if (there(value) && there(line)) cell.append(" ", h("span", { class: value < line ? "good" : "soft" }, value < line ? "below" : "above"));
  return cell;
}
function lossTable(all) {
  const rows = [];
  for (const spec of all.get("learning").concat(all.get("accuracy"))) {
    data.runs.forEach((run, number) => {
      const is = spec.form === "share" ? percent : figures, line = bound(run, spec.name), isLoss = spec.form !== "share";
      if (!(spec.name in run.recent)) return;
      const recent = run.recent[spec.name], held = run.last_held_out[spec.name], several = data.runs.length > 1;
      rows.push(row([several ? h("i", {}) : null, `${spec.title}${isLoss ? "" : ", accuracy"}`, several ? h("span", { class: "soft" }, ` ${run.name}`) : null],
        [is(run.first[spec.name]), isLoss ? verdict(recent, line) : is(recent), isLoss ? verdict(held, line) : is(held), is(line)], colour(number)));
    });
  }
  return rows.length ? table(["in numbers", "first step", "last 20 steps", "held-out", "entropy or most frequent"], rows) : null;
}
function faults(run) {
  const parts = [];
  if (run.skipped_count) {
    const named = run.skipped.map(counted).join(", ");
    parts.push(h("p", {}, `${counted(run.skipped_count)} step${run.skipped_count > 1 ? "s" : ""} changed nothing, because the loss or the gradient was not finite: ${named}${run.skipped_count > run.skipped.length ? ", …" : ""}`));
  }
  if (run.replaced_count) {
    const left = run.replaced_reasons - run.replaced.length;
    parts.push(table(["samples that others replaced, by reason", "stream", "count", "for example"],
      run.replaced.map((fault) => row(fault.reason, [h("td", {}, fault.stream), h("td", { class: "number" }, counted(fault.count)), h("td", {}, fault.example)])), "words"));
    if (left > 0) parts.push(h("p", { class: "soft" }, `and ${counted(left)} further reasons`));
  }
  return parts.length ? h("div", {}, headed(run), parts) : null;
}
function headed(run) {
  return data.runs.length > 1 ? h("h3", { class: "of", own: colour(data.runs.indexOf(run)) }, h("span", { class: "swatch" }), run.name) : null;
}
function restarts(run) {
  if (run.stretches.length < 2) return null;
  return h("div", {}, headed(run), table(["began again", "what the recipe said anew"],
    run.stretches.slice(1).map((stretch) => row(`after step ${counted(stretch.after)}`, [h("td", {}, stretch.changed.length ? stretch.changed.map((change) => h("div", {}, change)) : "nothing")])), "words"));
}
const TILES = ["original", "input", "guessed", "best possible"];
const TILES_LONG = ["original image", "input, with hidden patches in grey", "hidden patches as the model guesses them", "hidden patches drawn from the true codes, the best possible"];
function captioned(pieces) {
  return h("p", { class: "caption" }, pieces.map(([text, guess]) => {
    if (guess === null) return text;
    const space = text.startsWith(" ") ? " " : "";
    if (guess === text) return [space, h("span", { class: "right", title: "hidden, guessed right" }, text.trim())];
    return [space, h("span", { class: "wrong", title: "hidden; the guess, and what stands there" }, `${guess.trim()} → `, h("b", {}, text.trim()))];
  }).flat());
}
function pictures(run) {
  if (run.drawn.length) return h("div", {}, headed(run), h("p", { class: "soft" }, "Images of the last validation, with what is there and with what the model says."),
    h("div", { class: "pictures" }, run.drawn.map((src, number) => h("article", { class: "card" }, h("img", { src, alt: `image ${number + 1}, with what is there and what the model says` })))));
  if (run.why) return h("div", {}, headed(run), h("p", { class: "note soft" }, run.why));
  const parts = Object.entries(run.examples).map(([name, some]) => {
    const right = run.codes_right[name], kind = `${run.pictures} ${name === "pair_image" ? "pairs" : "images"}`;
    return [h("p", { class: "soft" }, `${kind[0].toUpperCase()}${kind.slice(1)}: `, there(right) ? `${percent(right, 0)} of the hidden codes guessed` : "nothing is hidden"),
      h("div", { class: "pictures" }, some.map((example, number) => h("article", { class: "card" },
        h("div", { class: "tiles" }, example.tiles.map((tile, i) => h("figure", {}, h("img", { src: tile, alt: `${TILES_LONG[i]}, example ${number + 1}` }), h("figcaption", {}, TILES[i])))),
        example.caption.length ? captioned(example.caption) : null)))];
  });
  const collapsed = run.collapsed.map((words) => h("p", { class: "bad" }, words));
  if (!parts.length) return h("div", {}, headed(run), collapsed, h("p", { class: "note soft" }, "This run masks no images: there is nothing to draw."));
  return h("div", {}, headed(run), collapsed, h("p", { class: "soft" }, `Drawn with the checkpoint of step ${counted(run.checkpoint_step)}.`), parts);
}
function recipes() {
  const parts = [];
  if (data.runs.length > 1) {
    const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.config)))];
    const differing = names.filter((name) => new Set(data.runs.map((run) => run.config[name] ?? "")).size > 1);
    parts.push(differing.length
      ? table(["where they differ", ...data.runs.map((run) => run.name)], differing.map((name) => row(name, data.runs.map((run) => h("td", {}, run.config[name] ?? "–")))), "words")
      : h("p", {}, "The recipes are the same."));
  }
  for (const run of data.runs) parts.push(h("details", {}, h("summary", {}, `Recipe of ${run.name}`), h("pre", {}, run.recipe)));
  return parts;
}
function section(id, title, about, ...content) {
  const kept = content.flat().filter(Boolean);
  if (!kept.length) return null;
  return h("section", { "aria-labelledby": `${id}-title`, id }, h("h2", { id: `${id}-title` }, title), about ? h("p", { class: "about" }, about) : null, kept);
}
function bounded() {
  return data.runs.some((run) => Object.keys(run.train.fields).some((name) => there(bound(run, name))));
}
function key() {
  const sign = (...shapes) => { const svg = s("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }); svg.append(...shapes); return svg; };
  const line = (width, dash) => s("path", { d: "M0 5H26", "stroke-width": width, ...(dash ? { "stroke-dasharray": dash } : {}) });
  const restarted = data.runs.some((run) => run.stretches.length > 1), several = data.runs.some((run) => run.train.width > 1);
  return h("ul", { class: "key" },
    h("li", {}, sign(line(1)), several ? "mean of a few steps, with their range" : "a step"), h("li", {}, sign(line(2.4)), "running mean"),
    h("li", {}, sign(s("circle", { cx: 13, cy: 5, r: 4 })), "held-out"), bounded() ? h("li", {}, sign(line(1.4, "6 4")), "entropy of the targets, or the most frequent one's share") : null,
    restarted ? h("li", {}, sign(s("path", { d: "M13 0V10", "stroke-dasharray": "1 3" })), "restart") : null);
}
function controls() {
  const select = (name, label, options, act) => {
    const list = h("select", { id: name }, options.map(([value, text]) => h("option", { value }, text)));
    list.addEventListener("change", () => { act(list.value); redraw(); });
    return h("label", {}, label, list);
  };
  const slider = h("input", { type: "range", min: 0, max: 20, step: 1, value: view.smooth, id: "smooth" }), told = h("output", { for: "smooth" }, `${view.smooth} %`);
  slider.addEventListener("input", () => { view.smooth = Number(slider.value); told.textContent = `${view.smooth} %`; redraw(); });
  const form = document.getElementById("controls");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.replaceChildren(
    select("axis", "over", [["steps", "steps"], ["hours", "time"], ["samples", "samples"]], (value) => { view.axis = value; view.cursor = null; }),
    select("from", "show", [["0", "the whole run"], ["0.5", "its last half"], ["0.9", "its last tenth"]], (value) => { view.from = Number(value); view.cursor = null; }),
    h("label", {}, "running mean over", slider, told));
}
let picturesShown = null;
function render() {
  const all = specs(), active = document.activeElement, open = new Set([...document.querySelectorAll("details[open] > summary")].map((e) => e.textContent));
  const runs = document.getElementById("runs"), focused = runs.contains(active) ? [...runs.querySelectorAll("input")].indexOf(active) : -1;
  runs.replaceChildren(...data.runs.map(runCard));
  if (focused >= 0) runs.querySelectorAll("input")[focused].focus();
  const wanted = JSON.stringify([...all].map(([id, some]) => [id, some.map((spec) => spec.name)])) + JSON.stringify(data.runs.map((run) => [run.pictures_version, run.stretches.length, run.replaced_count, run.skipped_count]));
  if (wanted !== picturesShown) {
    picturesShown = wanted;
    const drawn = (id) => (all.get(id).length ? h("div", { class: "charts" }, all.get(id).map((spec) => { if (!charts.has(spec.name)) charts.set(spec.name, new Chart(spec)); return charts.get(spec.name).element; })) : null);
    const parts = GROUPS.flatMap(([id, title, about]) => {
      const extra = id === "samples" ? data.runs.map(faults) : [];
      const made = section(id, title, all.get(id).length && (id !== "learning" && id !== "accuracy" || bounded()) ? about : "", id === "learning" && all.get(id).length ? key() : null, drawn(id), extra, id === "accuracy" || (id === "learning" && !all.get("accuracy").length) ? h("div", { class: "losses" }) : null);
      const shown = [made && made.querySelector(".charts, table, p:not(.about)") ? made : null];
      if (id === "accuracy") shown.push(section("pictures", "Pictures", "Hidden patches are drawn from codes, each as the mean of the training patches that carry it; hidden words of captions are marked, with the guess in front where it is wrong.", data.runs.map(pictures)));
      if (id === "samples") shown.push(section("restarts", "Restarts", "", data.runs.map(restarts)));
      return shown.filter(Boolean);
    });
    parts.push(section("recipe", data.runs.length > 1 ? "Recipes" : "Recipe", "", recipes()));
    document.getElementById("sections").replaceChildren(...parts);
    for (const details of document.querySelectorAll("details")) details.open = open.has(details.firstChild.textContent);
    document.getElementById("nav").replaceChildren(...parts.map((part) => h("a", { href: `#${part.id}` }, part.querySelector("h2").textContent)));
    if (active && active.isConnected && active !== document.body) active.focus();
  }
  const place = document.querySelector(".losses");
  if (place) place.replaceChildren(...[lossTable(all)].filter(Boolean));
  redraw();
  state();
}
let lost = false;
function state() {
  const words = document.getElementById("state");
  words.className = live ? `live${lost ? " lost" : ""}` : "";
  if (!live) { words.textContent = `Drawn ${data.made}`; return; }
  const newest = Math.max(...data.runs.map((run) => run.written));
  words.textContent = lost ? "The program that serves this page has ended: these are its last numbers" : `Following: last step ${ago(data.now + (performance.now() - received) / 1000 - newest)} ago`;
}
let received = performance.now(), version = data.version;
async function follow() {
  try {
    const answer = await fetch(`data?version=${encodeURIComponent(version)}`, { cache: "no-store" });
    if (answer.status === 200) { data = await answer.json(); version = data.version; received = performance.now(); lost = false; render(); }
    lost = false;
  } catch { lost = true; }
  state();
  setTimeout(follow, 2000);
}
controls();
render();
document.documentElement.dataset.drawn = "yes";
if (live) setTimeout(follow, 2000);
