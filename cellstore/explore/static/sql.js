// Questions: an answer as it comes, with Cancel; completion; and the list of tables beside it.

import { element, one_at_a_time } from "./page.js";

const form = document.querySelector("form[data-answer]");
const answer = document.getElementById("answer");
const status = form.querySelector("[data-status]");
const cancel = form.querySelector("[data-cancel]");
const box = document.getElementById("q");
const LONGEST_ADDRESS = 30000;
const working = one_at_a_time(cancel, (seconds) => { status.textContent = seconds; });

function parameters() {
  const given = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (value.trim() !== "") given.append(name, value);
  return given;
}

function said(words) {
  answer.replaceChildren(element("p", { className: "finding leaks", role: "alert" }, words));
}

async function ask() {
  const given = parameters();
  if (box && !given.has("q")) { box.focus(); return; }
  if (given.toString().length > LONGEST_ADDRESS) {
    said("The question is too long for an address. Save it in a file and run: cellstore sql --file FILE");
    return;
  }
  history.replaceState(null, "", `${form.getAttribute("action")}?${given}`);
  answer.classList.add("waiting");
  const words = await working(async (signal, is_mine) => {
    const found = await fetch(`${form.dataset.answer}?${given}`, { signal });
    const text = await found.text();
    if (!is_mine()) return "";
    const html = (found.headers.get("content-type") || "").startsWith("text/html");
    if (!html) return text;
    answer.innerHTML = text;  // a part of a page of our own server, which escapes
    const wrong = answer.querySelector("[data-line]");
    if (wrong && box) choose_line(Number(wrong.dataset.line));
    return "";
  });
  if (words === null) return;
  if (words) said(words);
  status.textContent = "";
  answer.classList.remove("waiting");
}

function choose_line(number) {
  const lines = box.value.split("\n");
  const start = lines.slice(0, number - 1).reduce((sum, line) => sum + line.length + 1, 0);
  box.focus();
  box.setSelectionRange(start, start + (lines[number - 1] || "").length);
}

form.addEventListener("submit", (event) => { event.preventDefault(); close_list(); ask(); });
if (form.hasAttribute("data-runs")) ask();

// Completion

let relations = [];
const list = document.getElementById("names");
let fitting = [];
let at = -1;

const KEYWORDS = ["SELECT", "FROM", "WHERE", "GROUP BY ALL", "ORDER BY", "LIMIT", "JOIN", "LEFT JOIN", "USING",
  "HAVING", "DISTINCT", "WITH", "CASE WHEN", "BETWEEN", "IS NOT NULL", "DESC", "UNION ALL", "EXCLUDE"];
const FUNCTIONS = ["count(*)", "avg(", "sum(", "min(", "max(", "median(", "stddev(", "quantile_cont(", "round(", "coalesce("];

function word_before(text) {
  const found = /(?:(\w+)\.)?(\w*)$/.exec(text);
  return { of: found[1] || "", word: found[2] };
}

function named(text) {
  // The relations behind FROM and JOIN, by the names that the question gives them.
  const found = new Map();
  for (const [, name, alias] of text.matchAll(/\b(?:from|join)\s+"?(\w+)"?(?:\s+(?:as\s+)?(?!on\b|using\b|where\b|join\b|left\b|group\b|order\b|limit\b|cross\b|inner\b)(\w+))?/gi)) {
    const relation = relations.find((item) => item.name.toLowerCase() === name.toLowerCase());
    if (relation) { found.set(name.toLowerCase(), relation); if (alias) found.set(alias.toLowerCase(), relation); }
  }
  return found;
}

function fits(every) {
  const before = box.value.slice(0, box.selectionStart);
  const { of, word } = word_before(before);
  if (!every && !of && word.length < 1) return [];
  const here = named(box.value);
  const column = ([name, type, words]) => ({ name, words: words || type });
  let candidates = [];
  if (of) {
    const relation = here.get(of.toLowerCase()) || relations.find((item) => item.name.toLowerCase() === of.toLowerCase());
    candidates = relation ? relation.columns.map(column) : [];
  } else if (/\b(?:from|join|describe|summarize)\s+\w*$/i.test(before)) {
    candidates = relations.map(({ name, words }) => ({ name, words }));
  } else {
    for (const relation of new Set(here.values())) candidates.push(...relation.columns.map(column));
    candidates.push(...relations.map(({ name, words }) => ({ name, words })));
    candidates.push(...FUNCTIONS.map((name) => ({ name, words: "function" })));
    if (word) candidates.push(...KEYWORDS.map((name) => ({ name, words: "" })));
  }
  const wanted = word.toLowerCase();
  const seen = new Set();
  const first = [], later = [];
  for (const item of candidates) {
    const name = item.name.toLowerCase();
    if (seen.has(name) || name === wanted) continue;
    seen.add(name);
    if (name.startsWith(wanted)) first.push(item);
    else if (wanted.length > 1 && name.includes(wanted)) later.push(item);
  }
  return [...first, ...later].slice(0, 40);
}

function show_list(every) {
  fitting = fits(every);
  at = -1;
  list.replaceChildren(...fitting.map((item, number) => {
    const row = element("li", { id: `name-${number}`, role: "option", "aria-selected": false },
      element("code", {}, item.name), element("span", {}, item.words));
    row.addEventListener("mousedown", (event) => { event.preventDefault(); take(number); });
    return row;
  }));
  list.hidden = fitting.length === 0;
  box.setAttribute("aria-expanded", String(!list.hidden));
  box.removeAttribute("aria-activedescendant");
}

function close_list() {
  if (!list) return;
  fitting = [];
  list.hidden = true;
  box.setAttribute("aria-expanded", "false");
  box.removeAttribute("aria-activedescendant");
}

function mark(number) {
  at = (number + fitting.length) % fitting.length;
  [...list.children].forEach((row, index) => row.setAttribute("aria-selected", String(index === at)));
  list.children[at].scrollIntoView({ block: "nearest" });
  box.setAttribute("aria-activedescendant", list.children[at].id);
}

function insert(name, start) {
  const text = /^[A-Za-z_][\w]*$|[( *]/.test(name) ? name : `"${name.replaceAll('"', '""')}"`;
  box.setSelectionRange(start, box.selectionEnd);
  // As if it were typed, so that Ctrl+Z takes it back.
  if (!document.execCommand("insertText", false, text)) box.setRangeText(text, start, box.selectionEnd, "end");
}

function take(number) {
  const { word } = word_before(box.value.slice(0, box.selectionStart));
  const { name } = fitting[number];
  close_list();
  insert(name, box.selectionStart - word.length);
  close_list();
}

if (box) {
  box.addEventListener("input", (event) => { if (event.inputType !== "insertFromPaste") show_list(false); });
  // Not on the way to a button: what closes above it would move it from under the pointer.
  box.addEventListener("blur", (event) => { if (!form.contains(event.relatedTarget)) close_list(); });
  box.addEventListener("click", close_list);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
    else if (event.key === " " && event.ctrlKey) { event.preventDefault(); show_list(true); }
    else if (list.hidden) return;
    else if (event.key === "ArrowDown") { event.preventDefault(); mark(at + 1); }
    else if (event.key === "ArrowUp") { event.preventDefault(); mark(at < 0 ? -1 : at - 1); }
    else if (event.key === "Tab" || (event.key === "Enter" && at >= 0)) { event.preventDefault(); take(Math.max(at, 0)); }
    else if (event.key === "Escape") { event.preventDefault(); close_list(); }
  });
  load_relations();
}

// The list of tables

async function load_relations() {
  const place = document.getElementById("relations");
  try {
    const found = await fetch("/sql/names");
    if (!found.ok) { place.textContent = await found.text(); return; }
    relations = await found.json();
  } catch { place.textContent = "The list cannot be loaded."; return; }
  const find = document.getElementById("find");
  find.addEventListener("input", () => list_relations(place, find.value));
  list_relations(place, "");
}

const KINDS = { "view": "Views", "feature set": "Feature sets", "table": "Tables", "step": "Steps of the vote" };
const SHOWN_COLUMNS = 400;

function list_relations(place, wanted) {
  const text = wanted.trim().toLowerCase();
  const parts = [];
  for (const [kind, title] of Object.entries(KINDS)) {
    const rows = [];
    for (const relation of relations) {
      if (relation.kind !== kind) continue;
      const whole = relation.name.toLowerCase().includes(text);
      const columns = whole ? relation.columns : relation.columns.filter(([name]) => name.toLowerCase().includes(text));
      if (text && !whole && columns.length === 0) continue;
      rows.push(described(relation, columns, Boolean(text) && !whole));
    }
    if (rows.length === 0) continue;
    parts.push(element("h3", {}, title), ...rows);
  }
  if (parts.length === 0) parts.push(element("p", { className: "soft" }, "Nothing of that name."));
  place.replaceChildren(...parts);
}

function described(relation, columns, open) {
  const details = element("details", {}, element("summary", {}, element("code", {}, relation.name)));
  const fill = () => {
    if (details.childElementCount > 1) return;
    const items = columns.slice(0, SHOWN_COLUMNS).map(([column, type, meaning]) => {
      const button = element("button", { type: "button", title: `${type}. Put it into the question.` }, column);
      button.addEventListener("click", () => { box.focus(); insert(column, box.selectionStart); close_list(); });
      return element("li", {}, button, element("span", { className: "soft" }, ` ${meaning}`));
    });
    const more = columns.length - SHOWN_COLUMNS;
    if (more > 0) items.push(element("li", { className: "soft" }, `and ${more} more`));
    details.append(element("p", { className: "soft" }, relation.words), element("ul", {}, ...items));
  };
  details.addEventListener("toggle", () => { if (details.open) fill(); });
  if (open) { fill(); details.open = true; }
  return details;
}
