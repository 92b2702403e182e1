// Labels, flags and exclusions by keyboard: a bar on each page where the explorer may write.
//
// What is labelled: the selection (events "cellstore:selection"), else the picture that has the focus
// ([data-cell], [data-image], a well of a plate map), else what the page is about ([data-annotate-level]). After each action
// "cellstore:annotated" is fired on the document, with level, ids and what to show of it.

import { element } from "./page.js";

const bar = document.getElementById("annotate");
const part = (name) => bar.querySelector(`[data-${name}]`);
const token = document.querySelector("meta[name=csrf]").content;
const STORED = "cellstore annotate";
const MOST = 9;

// --- what is kept: labels of the keys and their field in the address, the name in the browser

function stored() {
  try { return JSON.parse(localStorage.getItem(STORED)) ?? {}; } catch { return {}; }
}

function keep(values) {
  try { localStorage.setItem(STORED, JSON.stringify({ ...stored(), ...values })); } catch { /* private window */ }
}

const state = { field: "annotation", labels: [], user: stored().user ?? "" };

function into_address() {
  const hash = new URLSearchParams(location.hash.slice(1));
  hash.delete("key");
  hash.set("field", state.field);
  for (const label of state.labels) hash.append("key", label);
  history.replaceState(history.state, "", `${location.pathname}${location.search}#${hash}`);
  keep({ field: state.field, labels: state.labels });
}

async function begin() {
  const hash = new URLSearchParams(location.hash.slice(1));
  const kept = stored();
  state.field = hash.get("field") || kept.field || state.field;
  state.labels = hash.has("key") ? hash.getAll("key") : kept.field === state.field ? kept.labels ?? [] : [];
  if (!state.labels.length) {
    const answer = await fetch(`/annotate/labels?${new URLSearchParams({ field: state.field })}`);
    if (answer.ok) state.labels = (await answer.json()).labels;
  }
  state.labels = state.labels.filter((label) => typeof label === "string" && label).slice(0, MOST);
  show();
}

function show() {
  part("keys").replaceChildren(...state.labels.map((label, index) => element(
    "button", { type: "button", "data-label": label, "aria-keyshortcuts": index + 1 },
    element("kbd", {}, index + 1), ` ${label}`)));
  part("user").textContent = `Author: ${state.user || bar.dataset.login}`;
}

// --- what is meant

let selected = { level: "cell", ids: [] };
let focused = null; // last, outside of the bar and its dialogs
const is_ours = (element) => Boolean(element.closest("#annotate, dialog.annotating"));

function target() {
  if (selected.ids.length) return { ...selected, name: named(selected.level, selected.ids) };
  const focus = focused?.isConnected && focused.closest("[data-cell], [data-image]");
  if (focus) {
    const level = focus.dataset.cell ? "cell" : "image";
    const ids = [Number(focus.dataset[level])];
    return { level, ids, name: named(level, ids) };
  }
  const of_map = location.pathname.startsWith("/plate/") && focused?.isConnected;
  const well = of_map && focused.closest(".platemap a[href^='/well/']");
  if (well) {
    const name = well.getAttribute("href").split("?")[0].split("/").slice(2).map(decodeURIComponent).join("/");
    return { level: "well", ids: [name], name: `well ${name}` };
  }
  const thing = document.querySelector("[data-annotate-level]");
  if (!thing) return null;
  const { annotateLevel: level, annotateId: id, annotateName: name } = thing.dataset;
  return { level, ids: [Number(id)], name: name || named(level, [id]) };
}

function named(level, ids) {
  const word = level === "image" ? "field" : level;
  return ids.length === 1 ? `${word} ${ids[0]}` : `${ids.length.toLocaleString("en")} ${word}s`;
}

function say_target() {
  const found = target();
  bar.hidden = !found && !document.querySelector("[data-annotate-level], [data-pane], table.said");
  part("what").textContent = found ? found.name : "Nothing is selected.";
  for (const button of bar.querySelectorAll("[data-label], [data-do=flag], [data-do=exclude]")) button.disabled = !found;
}

document.addEventListener("cellstore:selection", (event) => {
  selected = { level: event.detail.level, ids: [...event.detail.ids] };
  say_target();
});
for (const kind of ["focusin", "pointerdown"]) {
  document.addEventListener(kind, (event) => {
    if (is_ours(event.target)) return;
    focused = event.target;
    say_target();
  });
}

// --- what is done

function tell(words, wrong = false) {
  part("told").textContent = words;
  part("told").classList.toggle("wrong", wrong);
}

async function send(there, body) {
  if (!state.user && "ask" in bar.dataset && !(await ask_user())) return null;
  tell("...");
  try {
    const answer = await fetch(there, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": token },
      body: JSON.stringify({ user: state.user, ...body }),
    });
    if (!answer.ok) { tell((await answer.text()).trim() || "This was not done.", true); return null; }
    const { said, notes } = await answer.json();
    tell([said, ...notes].filter(Boolean).join(". "));
    return said;
  } catch {
    tell("The explorer does not answer. Is it still running?", true);
    return null;
  }
}

const done = []; // of this page, for marks that are taken back

function announce(level, ids, text) {
  document.dispatchEvent(new CustomEvent("cellstore:annotated", { detail: { level, ids, text } }));
}

async function say(label, field) {
  const found = target();
  if (!found) { tell("Select something first.", true); return; }
  const { level, ids } = found;
  if (await send("/annotate", { level, ids, label, field }) !== null) {
    done.push({ level, ids });
    announce(level, ids, label);
  }
}

function ask(name, fill) {
  const dialog = document.querySelector(`[data-dialog=${name}]`);
  if (dialog.open) return Promise.resolve(null);
  dialog.returnValue = "";
  fill(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "ok" ? new FormData(dialog.querySelector("form")) : null);
    }, { once: true });
  });
}

async function exclude() {
  const found = target();
  if (!found) { tell("Select something first.", true); return; }
  const { level, ids, name } = found;
  const given = await ask("exclude", (dialog) => {
    dialog.querySelector("[data-of]").textContent = name;
    dialog.querySelector("input").value = "";
  });
  const reason = given?.get("reason").trim();
  if (reason && await send("/annotate/exclude", { level, ids, reason }) !== null) {
    done.push({ level, ids });
    announce(level, ids, `excluded: ${reason}`);
  }
}

async function undo(ids) {
  if (await send("/annotate/undo", ids ? { ids } : {}) === null) return false;
  const last = ids ? null : done.pop();
  if (last) announce(last.level, last.ids, "");
  return true;
}

async function choose_labels() {
  const given = await ask("labels", (dialog) => {
    dialog.querySelector("[name=field]").value = state.field;
    dialog.querySelector("[name=labels]").value = state.labels.join("\n");
  });
  if (!given) return;
  state.field = given.get("field").trim() || "annotation";
  const lines = given.get("labels").split("\n").map((line) => line.trim()).filter(Boolean);
  state.labels = [...new Set(lines)].slice(0, MOST);
  into_address();
  show();
  say_target();
}

async function ask_user() {
  const given = await ask("user", (dialog) => {
    dialog.querySelector("input").value = state.user || ("ask" in bar.dataset ? "" : bar.dataset.login);
  });
  if (!given) return false;
  state.user = given.get("user").trim();
  keep({ user: state.user });
  show();
  return Boolean(state.user);
}

const verbs = { flag: () => say("flagged", "flag"), exclude, undo: () => undo(), labels: choose_labels, user: ask_user };

bar.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.label) say(button.dataset.label, state.field);
  else if (button?.dataset.do) verbs[button.dataset.do]();
});

const KEYS = { f: "flag", x: "exclude", z: "undo" };

document.addEventListener("keydown", (event) => {
  if (bar.hidden || event.defaultPrevented || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea, dialog, [contenteditable]")) return;
  const label = state.labels[Number(event.key) - 1];
  const verb = KEYS[event.key.toLowerCase()];
  if (!label && !verb) return;
  event.preventDefault();
  if (label) say(label, state.field);
  else verbs[verb]();
});

// --- the page of what was said

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-undo]");
  if (!button) return;
  const mine = state.user || bar.dataset.login;
  const theirs = button.dataset.user;
  if (theirs !== mine && !confirm(`${theirs} said this, not ${mine}. Take it back all the same?`)) return;
  button.disabled = true;
  if (await undo([Number(button.dataset.undo)])) location.reload();
  else button.disabled = false;
});

document.body.classList.add("with-bar");
say_target();
begin().then(say_target);
