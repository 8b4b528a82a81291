"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const boxes = [...document.querySelectorAll("#filters input")];
const SVG = "http://www.w3.org/2000/svg";
// sort, dir and hide describe the table; role and q the question that is read.
const state = { sort: "", dir: "", hide: new Set(), role: "forget", q: 0 };

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  state.sort = given.get("sort") || "";
  state.dir = given.get("dir") || "";
  state.hide = new Set((given.get("hide") || "").split(",").filter(Boolean));
  state.role = given.get("role") || "forget";
  state.q = Number(given.get("q")) || 0;
}

function writeAddress() {
  const parts = new URLSearchParams();
  if (state.sort) { parts.set("sort", state.sort); parts.set("dir", state.dir); }
  if (state.hide.size) parts.set("hide", [...state.hide].join(","));
  if (state.role !== "forget") parts.set("role", state.role);
  if (state.q) parts.set("q", state.q);
  history.replaceState(null, "", "#" + parts);
}

function node(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

const shownRows = () => data.rows.filter((row) => !row.failed && !state.hide.has(row.label));

// --- the table

function sortTable() {
  const body = document.querySelector("#rows tbody");
  const original = new Map(data.rows.map((row, at) => [row.label, at]));
  const heads = [...document.querySelectorAll("#rows [data-sort]")];
  const at = heads.findIndex((head) => head.dataset.sort === state.sort);
  const sign = state.dir === "descending" ? -1 : 1;
  const value = (row) => {
    if (state.sort === "label") return row.dataset.label;
    const cell = row.cells[at];
    return cell && cell.dataset.value !== undefined ? Number(cell.dataset.value) : null;
  };
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    // What has no figure is last, whichever way.
    if (at >= 0 && (x === null) !== (y === null)) return x === null ? 1 : -1;
    if (at >= 0 && x !== y && x !== null) return (x < y ? -1 : 1) * sign;
    return original.get(a.dataset.label) - original.get(b.dataset.label);
  });
  body.append(...rows);
  heads.forEach((head) => {
    const chosen = at >= 0 && head.dataset.sort === state.sort;
    head.closest("th").setAttribute("aria-sort", chosen ? state.dir || "ascending" : "none");
  });
  for (const row of rows) row.hidden = state.hide.has(row.dataset.label);
  for (const box of boxes) box.checked = !state.hide.has(box.dataset.label);
}

// --- pictures

// Round numbers within a span, some five of them, and the digits that they need.
function ticks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const values = Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, k) => (first + k) * step);
  return { values, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function axes(title, xName, yName, xs, ys, steps = false) {
  const [width, height, left, right, top, base] = [480, 330, 46, 12, 12, 286];
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  const span = (values, low) => {
    const [least, most] = [Math.min(low, ...values), Math.max(...values, low + 0.05)];
    return [least, most + 0.06 * (most - least)];
  };
  const [x0, x1] = span(xs, 0), [y0, y1] = span(ys, Math.min(1, ...ys) < 0.5 ? 0 : Math.min(1, ...ys) - 0.05);
  const x = (value) => left + (width - left - right) * (value - x0) / (x1 - x0);
  const y = (value) => base - (base - top) * (value - y0) / (y1 - y0);
  svg.append(node("path", { class: "axis", d: `M${left} ${top}V${base}H${width - right}` }));
  const [across, up] = [ticks(x0, x1), ticks(y0, y1)];
  for (const value of steps ? [] : across.values) {
    svg.append(node("text", { x: x(value), y: base + 15, "text-anchor": "middle" }, value.toFixed(across.digits)));
  }
  for (const value of up.values) {
    svg.append(node("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(up.digits)));
    svg.append(node("path", { class: "axis", "stroke-dasharray": "2 4", d: `M${left} ${y(value)}H${width - right}` }));
  }
  for (const step of steps ? new Set(xs) : []) {
    svg.append(node("text", { x: x(step), y: base + 15, "text-anchor": "middle" }, step));
  }
  svg.append(node("text", { x: (left + width) / 2, y: height - 8, "text-anchor": "middle" }, xName));
  svg.append(node("text", { x: -(top + base) / 2, y: 10, transform: "rotate(-90)", "text-anchor": "middle" }, yName));
  return { svg, x, y };
}

function scatter(place, left, kept, title) {
  const points = shownRows().map((row) => ({ row, x: row.figures[left], y: row.figures[kept] }))
    .filter((point) => point.x[0] !== null && point.y[0] !== null);
  place.replaceChildren(element("figcaption", "", title));
  if (!points.length) { place.append(element("p", "faint", "Nothing to draw.")); return; }
  const drawn = axes(title, "left of the forgotten", "kept, relative to before",
    points.map((p) => p.x[0] + (p.x[1] || 0)), points.map((p) => p.y[0]));
  const best = points.filter((p) => p.row.kind !== "control").filter((p, _, all) => !all.some((other) =>
    other.x[0] <= p.x[0] && other.y[0] >= p.y[0] && (other.x[0] < p.x[0] || other.y[0] > p.y[0])));
  best.sort((a, b) => a.x[0] - b.x[0]);
  if (best.length > 1) {
    drawn.svg.append(node("path", { class: "frontier",
      d: "M" + best.map((p) => `${drawn.x(p.x[0])} ${drawn.y(p.y[0])}`).join("L") }));
  }
  const taken = points.map((p) => [drawn.x(p.x[0]) - 5, drawn.y(p.y[0]), 10]);
  for (const { row, x, y } of points) {
    const [px, py] = [drawn.x(x[0]), drawn.y(y[0])];
    if (x[1]) drawn.svg.append(node("path", { class: "whisker", d: `M${drawn.x(x[0] - x[1])} ${py}H${drawn.x(x[0] + x[1])}` }));
    if (y[1]) drawn.svg.append(node("path", { class: "whisker", d: `M${px} ${drawn.y(y[0] - y[1])}V${drawn.y(y[0] + y[1])}` }));
    const dot = node("circle", { cx: px, cy: py, r: 5, class: row.kind });
    dot.append(node("title", {}, `${row.label}: left ${x[0].toFixed(3)}, kept ${y[0].toFixed(3)}`));
    drawn.svg.append(dot);
    // Beside the dot, above or below it; a label that would cover another everywhere is left to the dot's title.
    const name = row.label.length > 24 ? row.label.slice(0, 23) + "…" : row.label;
    const wide = 6.2 * name.length, middle = Math.min(Math.max(px - wide / 2, 48), 470 - wide);
    const free = [[px + 9, py], [px - 9 - wide, py], [middle, py - 13], [middle, py + 13]].find(([side, level]) =>
      side >= 46 && side + wide <= 470 && level >= 8 && level <= 284
      && !taken.some(([tx, ty, tw]) => Math.abs(ty - level) < 11 && side < tx + tw && tx < side + wide));
    if (free) {
      taken.push([...free, wide]);
      drawn.svg.append(node("text", { x: free[0], y: free[1] + 4, class: row.kind }, name));
    }
  }
  place.append(drawn.svg);
}

function curves() {
  const rows = shownRows().filter((row) => row.curve.length);
  $("curves").replaceChildren();
  for (const [key, title] of [["forget_rouge", "ROUGE-L on the facts so far, by step"],
    ["keep_rouge", "kept ROUGE-L, relative to before, by step"]]) {
    const lines = rows.map((row) => ({ row, points: row.curve.map((p) => [p.step, p[key].mean]).filter((p) => p[1] !== null) }))
      .filter((line) => line.points.length);
    if (!lines.length) continue;
    const place = element("figure");
    const caption = element("figcaption", "", `${title}: `);
    place.append(caption);
    const drawn = axes(title, "step", "", lines.flatMap((l) => l.points.map((p) => p[0])),
      lines.flatMap((l) => l.points.map((p) => p[1])), true);
    lines.forEach((line, at) => {
      const colour = `hsl(${360 * at / lines.length} 65% 50%)`;
      drawn.svg.append(node("path", { class: "line", stroke: colour,
        d: "M" + line.points.map(([x, y]) => `${drawn.x(x)} ${drawn.y(y)}`).join("L") }));
      const name = element("span", "", `${line.row.label} `);
      name.style.color = colour;
      caption.append(name);
    });
    place.append(drawn.svg);
    $("curves").append(place);
  }
}

function costs() {
  const rows = shownRows().filter((row) => row.figures.seconds[0]);
  const most = Math.max(...rows.map((row) => row.figures.seconds[0]), 1e-9);
  $("costs").replaceChildren(...rows.map((row) => {
    const [seconds, memory] = [row.figures.seconds[0], row.figures.memory[0]];
    const bar = element("div", "bar"), track = element("span"), fill = element("b", row.kind);
    fill.style.width = `${100 * seconds / most}%`;
    track.append(fill);
    bar.append(element("span", "", row.label), track,
      element("span", "faint", `${seconds.toFixed(1)} s` + (memory ? `, ${memory.toFixed(2)} GiB` : "")));
    return bar;
  }));
}

// --- answers

const asked = () => data.answers.filter((each) => each.role === state.role);

function marked(place, text, truth) {
  const words = new Set(truth.toLowerCase().match(/[\p{L}\p{N}]{3,}/gu) || []);
  for (const piece of text.split(/([\p{L}\p{N}]+)/u)) {
    place.append(words.has(piece.toLowerCase()) ? element("mark", "", piece) : piece);
  }
}

function listQuestions() {
  $("question").replaceChildren(...asked().map((each, at) => {
    const option = element("option", "", `${at + 1}. ${each.question}`);
    option.value = at;
    return option;
  }));
}

function read() {
  const all = asked();
  const place = $("reading");
  place.replaceChildren();
  $("role").value = state.role;
  if (!all.length) { place.append(element("p", "faint", "No question of this set was asked.")); return; }
  state.q = Math.min(Math.max(state.q, 0), all.length - 1);
  $("question").value = state.q;
  const each = all[state.q], truth = element("div", "truth"), grid = element("div", "said");
  truth.append(element("p", "", each.question), element("b", "", each.answer));
  for (const row of data.rows) {
    const said = each.said[row.label];
    if (!said || (state.hide.has(row.label) && row.label !== "none")) continue;
    const card = element("article", row.label === "none" ? "before" : ""), head = element("h3");
    head.append(element("span", `dot ${row.kind}`), row.label === "none" ? "before" : row.label);
    if (said.rouge !== null) head.append(element("small", "", `ROUGE-L ${said.rouge.toFixed(2)}, p ${(said.prob || 0).toFixed(2)}`));
    const text = element("p");
    marked(text, said.text.trim() || "(nothing)", each.answer);
    card.append(head, text);
    const back = each.matched[row.label];
    if (back && back.text !== said.text) {
      const other = element("p", "back", "at equal retention: ");
      marked(other, back.text.trim() || "(nothing)", each.answer);
      card.append(other);
    }
    grid.append(card);
  }
  place.append(truth, grid);
}

// --- together

function show() {
  sortTable();
  scatter($("by-rouge"), "forget_rouge", "keep_rouge", "By what is said: ROUGE-L recall");
  scatter($("by-prob"), "forget_prob", "keep_prob", "By what is held likely: probability");
  curves();
  costs();
  listQuestions();
  read();
}

function change(act) { act(); writeAddress(); show(); }

document.querySelectorAll("#rows [data-sort]").forEach((head) => head.addEventListener("click", () => change(() => {
  const again = state.sort === head.dataset.sort;
  state.dir = again && state.dir !== "descending" ? "descending" : "ascending";
  state.sort = head.dataset.sort;
})));
boxes.forEach((box) => box.addEventListener("change", () => change(() => {
  if (box.checked) state.hide.delete(box.dataset.label); else state.hide.add(box.dataset.label);
})));
document.querySelectorAll("#filters [data-kind]").forEach((button) => button.addEventListener("click", () => change(() => {
  const kind = button.dataset.kind;
  state.hide = new Set(data.rows.filter((row) => kind !== "all" && row.kind !== kind).map((row) => row.label));
})));
$("role").addEventListener("change", () => change(() => { state.role = $("role").value; state.q = 0; }));
$("question").addEventListener("change", () => change(() => { state.q = Number($("question").value); }));
$("earlier").addEventListener("click", () => change(() => { state.q -= 1; }));
$("later").addEventListener("click", () => change(() => { state.q += 1; }));
addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && !/^(SELECT|INPUT)$/.test(document.activeElement.tagName)) change(() => { state.q += step; });
});
addEventListener("hashchange", () => { readAddress(); show(); });
readAddress();
show();
