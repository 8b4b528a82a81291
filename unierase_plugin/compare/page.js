"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const boxes = [...document.querySelectorAll("#filters input")];
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

function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

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

// --- charts

// A part of a chart is named by its row's number. The lines from points to names stand for all rows or for none.
function filterCharts() {
  data.rows.forEach((row, at) => {
    for (const part of document.querySelectorAll(`.pictures [id^="row-${at}-"]`)) {
      part.classList.toggle("off", state.hide.has(row.label));
    }
  });
  for (const line of document.querySelectorAll('.pictures [id^="name-line-"]')) {
    line.classList.toggle("off", state.hide.size > 0);
  }
}

// What a point says when the pointer rests on it.
function titleCharts() {
  data.rows.forEach((row, at) => {
    const { forget_rouge: left, keep_rouge: kept } = row.figures;
    if (left === null || kept === null) return;
    for (const part of document.querySelectorAll(`#tradeoff [id^="row-${at}-"]`)) {
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = `${row.label}: ROUGE-L ${left.toFixed(3)} left, ${kept.toFixed(3)} kept`;
      part.prepend(title);
    }
  });
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
  filterCharts();
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
titleCharts();
readAddress();
show();
