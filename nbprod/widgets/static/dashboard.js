// The dashboard's drawing: one SVG from one JSON state, drawn again whenever the state changes.
// Plain SVG text and shapes, so that the same picture can be saved as a PNG when watching ends.

const PAD = 16, GAP = 12, HEAD = 58, TOP = 66, FLOW = 208, WIDE = 720, SILENCE = 10, UNKNOWN = "no data";
const STATUS = {
  connecting: ["quiet", "Connecting"], live: ["good", "Live"], stale: ["warned", "Stale"],
  down: ["failed", "Down"], paused: ["quiet", "Paused"], stopped: ["quiet", "Stopped"],
};

const known = (value) => typeof value === "number" && Number.isFinite(value);
const last = (values) => values[values.length - 1];
const escape = (text) => String(text ?? "").replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const number = (value, digits = 0) => known(value)
  ? value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : UNKNOWN;
const rough = (value) => number(value, value < 9.95 ? 1 : 0);
const percent = (share) => number(100 * share, share > 0 && share < 0.0995 ? 1 : 0);
const mark = (value) => value.toLocaleString("en-US", { maximumSignificantDigits: 3 });
const latency = (ms) => !known(ms) ? [UNKNOWN, ""] : ms < 1000 ? [rough(ms), "ms at p95"] : [number(ms / 1000, 1), "s at p95"];
const short = (text, width) => {  // names that do not fit keep their beginning; 6.2 px is a letter's mean width
  const room = Math.floor(width / 6.2), name = String(text);
  return name.length > room ? `${name.slice(0, Math.max(1, room - 1))}…` : name;
};

const text = (x, y, content, cls = "") => `<text x="${x}" y="${y}" class="${cls}">${content}</text>`;
const line = (x1, y1, x2, y2, cls) => `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" class="${cls}"/>`;
const rect = (x, y, w, h, cls, rx = 0) =>
  `<rect x="${x}" y="${y}" width="${Math.max(0, w)}" height="${Math.max(0, h)}" rx="${rx}" class="${cls}"/>`;

// Round numbers from 0 up to `top` or just beyond, in at most `most` steps.
function ticks(top, most) {
  const power = 10 ** Math.floor(Math.log10(top / most));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((each) => top <= each * most * 1.001);
  return Array.from({ length: Math.ceil(top / step * 0.999) + 1 }, (_, i) => i * step);
}

// A card with its title, its one large number and what stands beside it; returns the room left for the chart.
function card(box, title, value, unit, legend = "") {
  const { x, y, w, h } = box;
  const svg = rect(x + 0.5, y + 0.5, w - 1, h - 1, "card", 6) + text(x + PAD, y + 24, title, "title")
    + (value === UNKNOWN ? text(x + PAD, y + 50, UNKNOWN, "unit")
      : text(x + PAD, y + 52, `${value}<tspan class="unit" dx="5">${unit}</tspan>`, "value"))
    + (legend ? text(x + w - PAD, y + 24, legend, "quiet end") : "");
  return [svg, { x: x + PAD, y: y + TOP, w: w - 2 * PAD, h: h - TOP - PAD }];
}

// Horizontal lines at round values; the unit is written once, at the top.
const levels = (scale, left, right, y, unit) => scale.map((v) => line(left, y(v), right, y(v), v ? "grid" : "axis")
  + text(left - 6, y(v) + 4, unit === "%" ? `${mark(100 * v)}%` : mark(v) + (v === last(scale) ? unit : ""), "quiet end")).join("");

const nothing = (room, words) => text(room.x + room.w / 2, room.y + room.h / 2, escape(words), "quiet middle");

// Lines over the last minutes. `curves` are [class, name, values]; the first may be filled down to zero.
function timeline(room, state, curves, least, unit, filled, hover) {
  const left = room.x + 40, right = room.x + room.w - (filled ? 0 : 28), bottom = room.y + room.h - 16;
  const scale = ticks(Math.max(least, ...curves.flatMap(([, , values]) => values.filter(known))), 4);
  const x = (age) => right - (age / state.window) * (right - left);
  const y = (value) => bottom - (value / last(scale)) * (bottom - room.y);
  let svg = levels(scale, left, right, y, unit);
  svg += text(left, bottom + 15, `${mark(state.window / 60)} min ago`, "quiet") + text(right, bottom + 15, "now", "quiet end");
  svg += state.gaps.map(([from, to]) => rect(x(from), room.y, x(to) - x(from), bottom - room.y, "gap")
    + (x(to) - x(from) > 60 ? text((x(from) + x(to)) / 2, room.y + 14, "no answer", "quiet middle") : "")).join("");
  const labels = [];
  for (const [cls, name, values] of curves) {
    const runs = [[]];
    values.forEach((value, i) => known(value)
      ? last(runs).push(`${x(state.ages[i]).toFixed(1)},${y(value).toFixed(1)}`) : last(runs).length && runs.push([]));
    for (const run of runs.filter((r) => r.length)) {
      const [start, end] = [run[0].split(",")[0], last(run).split(",")[0]];
      if (filled) svg += `<path class="area" d="M${start},${bottom}L${run.join("L")}L${end},${bottom}Z"/>`;
      svg += `<path class="curve ${cls}" d="M${run.join("L")}${run.length > 1 ? "" : "h0.1"}"/>`;
    }
    const ending = values.findLast(known);
    if (name && known(ending)) labels.push([y(ending) + 4, name]);
  }
  labels.sort((a, b) => b[0] - a[0]);  // from the lowest up, each at least a line above the one before
  labels.forEach((label, i) => { if (i) label[0] = Math.min(label[0], labels[i - 1][0] - 12); });
  svg += labels.map(([at, name]) => text(right + 5, at, name, "quiet")).join("");
  if (hover !== null) svg += line(x(state.ages[hover]), room.y, x(state.ages[hover]), bottom, "cursor");
  return [svg, { left, right }];
}

// The share of rows in each bin: the service as bars, the model's baseline as a step line over them.
function distribution(box, { service, baseline, marks, meaning, period }) {
  const room = { ...box, h: box.h - 18 }, left = room.x + 40, right = room.x + room.w, bottom = room.y + room.h - 16;
  const wide = (right - left) / baseline.length;
  const scale = ticks(Math.max(0.01, ...baseline, ...(service ?? [])), 5);
  const y = (share) => bottom - (share / last(scale)) * (bottom - room.y);
  let svg = levels(scale, left, right, y, "%");
  svg += (service ?? []).map((v, i) => rect(left + i * wide + 1, y(v), wide - 2, bottom - y(v), "bar", 1)).join("");
  svg += `<path class="baseline" d="M${left},${bottom}${baseline.map((v, i) =>
    `V${y(v).toFixed(1)}H${(left + (i + 1) * wide).toFixed(1)}`).join("")}V${bottom}"/>`;
  svg += marks.map(([at, label]) => text(left + at * (right - left), bottom + 15, escape(short(label, 90)),
    `quiet ${at === 0 ? "" : at === 1 ? "end" : "middle"}`)).join("");
  const caption = `${escape(short(meaning, 160))} · ${escape(period)}`;
  return svg + text((left + right) / 2, box.y + box.h + 2, caption, "quiet middle");
}

// One bar a feature, the furthest from training first, with the line from which on a distance is called drift.
// One that is beyond it and not called drifted may still be there by chance: "unsure".
function features(room, { columns, threshold }) {
  const height = 19, fit = Math.min(columns.length, Math.floor((room.h - 16) / height));
  const shown = columns.slice(0, columns.length > fit ? fit : columns.length);
  const names = Math.min(150, room.w * 0.34), left = room.x + names, right = room.x + room.w - 84;
  const top = 1.1 * Math.max(2 * threshold, ...columns.map((c) => c.distance).filter(known));
  const x = (distance) => left + Math.min(1, distance / top) * (right - left);
  let svg = shown.map((column, i) => {
    const y = room.y + 10 + i * height, strong = column.drifted ? "strong" : "";
    const verdict = column.drifted ? "drifted" : column.distance > threshold ? "unsure" : "";
    const length = known(column.distance) ? x(column.distance) - left : 0;
    return text(room.x, y + 11, escape(short(column.name, names - 8)), strong)
      + rect(left, y + 3, right - left, 10, "track", 2)
      + rect(left, y + 3, length, 10, `bar ${column.drifted ? "warn" : ""}`, 2)
      + text(right + 36, y + 11, number(column.distance, 2), `end ${strong}`)
      + text(right + 42, y + 11, verdict, strong || "quiet");
  }).join("");
  const bottom = room.y + 10 + shown.length * height;
  svg += line(x(threshold), room.y + 6, x(threshold), bottom, "threshold")
    + text(x(threshold), room.y, `threshold ${number(threshold, 2)}`, "quiet middle");
  const rest = columns.length - shown.length, more = columns.slice(shown.length).filter((c) => c.drifted).length;
  return svg + (rest ? text(room.x, bottom + 14, `and ${rest} more, ${more || "none"} drifted`, "quiet") : "");
}

function header(state, width) {
  const [name, version] = state.model ? state.model.split(/:(.*)/s) : [state.url, ""];
  const [cls, word] = STATUS[state.status] ?? ["quiet", state.status];
  const facts = [state.model && state.url, state.run && state.run !== version && `run ${state.run}`,
    state.commit && `commit ${state.commit.slice(0, 8)}`];
  return text(2, 20, `${escape(short(name, width * 0.32))}<tspan class="version" dx="8">${escape(version)}</tspan>`, "name")
    + text(2, 40, escape(short(facts.filter(Boolean).join("  ·  "), width * (width < WIDE ? 0.5 : 0.62))), "quiet")
    + text(width - 2, 20, `<tspan class="${cls}">●</tspan> ${escape(word)}`, "status end")
    + text(width - 2, 40, escape(short(state.message ?? "", width * (width < WIDE ? 0.48 : 0.36))), "quiet end");
}

// The whole picture for a width. `hover` is a position in the time series that the pointer is on, or null.
function picture(state, width, hover) {
  const wide = width >= WIDE, at = hover ?? state.ages.length - 1;
  const third = wide ? (width - 2 * GAP) / 3 : width, half = wide ? (width - GAP) / 2 : width;
  const rows = Math.min(10, state.drift?.columns.length ?? 0);
  const tall = Math.max(240, TOP + PAD + 32 + rows * 19);
  const boxes = [0, 1, 2].map((i) => wide ? { x: i * (third + GAP), y: HEAD, w: third, h: FLOW }
    : { x: 0, y: HEAD + i * (FLOW + GAP), w: width, h: FLOW });
  const below = last(boxes).y + FLOW + GAP;
  const lower = [0, 1].map((i) => wide ? { x: i * (half + GAP), y: below, w: half, h: tall }
    : { x: 0, y: below + i * (tall + GAP), w: width, h: tall });
  const height = last(lower).y + tall + 2, areas = [];
  let svg = rect(0, 0, width, height, "ground") + header(state, width);
  const when = hover === null ? "" : new Date((state.clock - state.ages[hover]) * 1000).toLocaleTimeString("en-GB");
  const chart = (box, title, value, unit, curves, least, axis, filled) => {
    const [frame, room] = card(box, title, value, unit, when);
    const [inside, area] = timeline(room, state, curves, least, axis, filled, hover);
    areas.push({ ...area, top: box.y, bottom: box.y + box.h });
    svg += frame + inside;
  };
  const { rate, p50, p95, p99, client, server } = state;
  const seconds = last(ticks(Math.max(5, ...p99.filter(known)), 4)) >= 1000, scaled = (values) =>
    values.map((value) => (known(value) && seconds ? value / 1000 : value));
  chart(boxes[0], "Requests", rough(rate[at]), "a second", [["first", "", rate]], 1, "", true);
  chart(boxes[1], "Latency", ...latency(p95[at]), [["light", "p50", scaled(p50)], ["mid", "p95", scaled(p95)],
    ["first", "p99", scaled(p99)]], seconds ? 0.005 : 5, seconds ? " s" : " ms", false);
  chart(boxes[2], "Errors", known(client[at]) ? percent(client[at] + server[at]) : UNKNOWN, "% of requests",
    [["warn", "4xx", client], ["bad", "5xx", server]], 0.04, "%", false);

  const key = `<tspan class="bar">■</tspan> service   <tspan class="strong">━</tspan> baseline`;
  const waiting = state.answered ? "the service tells of no baseline to compare with" : "waiting for the service";
  let [frame, room] = card(lower[0], "Predictions", number(state.rows), "rows predicted", state.predictions ? key : "");
  svg += frame + (state.predictions ? distribution(room, state.predictions) : nothing(room, waiting));
  const drift = state.drift, columns = drift?.columns ?? [], drifted = columns.filter((c) => c.drifted).length;
  [frame, room] = card(lower[1], "Drift by feature", columns.length ? drifted : UNKNOWN,
    `of ${columns.length} features drifted`, columns.length ? escape(drift.period) : "");
  svg += frame + (columns.length ? features({ ...room, y: room.y + 12, h: room.h - 12 }, drift)
    : nothing(room, drift ? "waiting for rows" : waiting));
  return { svg, width, height, areas };
}

// The SVG as a PNG. An image knows no style sheet of the page, so each element takes its computed style along.
const STYLES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linejoin",
  "stroke-linecap", "font-family", "font-size", "font-weight", "font-variant-numeric", "letter-spacing", "text-anchor"];
async function png(svg) {
  const copy = svg.cloneNode(true), from = svg.querySelectorAll("*"), scale = 2;
  copy.querySelectorAll("*").forEach((element, i) => {
    const computed = getComputedStyle(from[i]);
    element.setAttribute("style", STYLES.map((name) => `${name}:${computed.getPropertyValue(name)}`).join(";"));
  });
  const image = new Image(), [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: width * scale, height: height * scale });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return { width, buffer: await blob.arrayBuffer() };
}

function render({ model, el }) {
  el.classList.add("nbprod-dashboard");
  let drawn = null, hover = null, heard = Date.now();
  const current = () => {  // the kernel's last word, which is old where the kernel is gone
    const state = model.get("state"), silent = (Date.now() - heard) / 1000;
    return silent < SILENCE + 3 * state.interval || !["live", "stale"].includes(state.status) ? state
      : { ...state, status: "stale", message: `no word from the kernel for ${Math.round(silent)} s` };
  };
  const draw = () => {
    const state = current();
    if (!state.ages) return;
    if (hover !== null && hover >= state.ages.length) hover = null;
    drawn = picture(state, Math.round(el.clientWidth) || 960, hover);
    el.innerHTML = `<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="${escape(state.text)}"
      viewBox="0 0 ${drawn.width} ${drawn.height}" data-status="${escape(state.status)}">${drawn.svg}</svg>`;
  };
  const point = (event) => {
    const state = model.get("state"), box = el.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top, before = hover;
    const area = drawn?.areas.find((a) => x >= a.left && x <= a.right && y >= a.top && y <= a.bottom);
    const age = area ? ((area.right - x) / (area.right - area.left)) * state.window : null;
    hover = age === null || !state.ages.length || age > state.ages[0] + 2 ? null : state.ages.reduce(
      (best, value, i) => (Math.abs(value - age) < Math.abs(state.ages[best] - age) ? i : best), 0);
    if (hover !== before) draw();
  };
  const leave = () => { hover = null; draw(); };
  const update = () => { heard = Date.now(); draw(); };
  const beat = () => {
    if (current() !== model.get("state")) draw();
    if (document.visibilityState === "visible") model.send({ kind: "beat" });
  };
  const answer = async (message) => {
    if (message.kind !== "picture") return;
    draw();
    const { width, buffer } = await png(el.querySelector("svg"));
    model.send({ kind: "picture", width }, undefined, [buffer]);
  };
  const size = new ResizeObserver(draw), timer = setInterval(beat, 3000);
  size.observe(el);
  model.on("change:state", update);
  model.on("msg:custom", answer);
  el.addEventListener("pointermove", point);
  el.addEventListener("pointerleave", leave);
  document.addEventListener("visibilitychange", beat);
  beat();
  draw();
  return () => {
    clearInterval(timer);
    size.disconnect();
    model.off("change:state", update);
    model.off("msg:custom", answer);
    document.removeEventListener("visibilitychange", beat);
  };
}

export default { render };
