// The gallery: sheets of crops that follow each other while one scrolls, keys, and the selection.

import { element } from "./page.js";
import { selection } from "./selection.js";

const about = document.getElementById("about");
const selected = document.getElementById("selected");
const panes = [...document.querySelectorAll(".pane")];
const cropsOf = (pane) => [...pane.querySelectorAll(".crop")];
let anchor = null; // where a selection with Shift begins

// Sheets

async function grow(pane) {
  const last = [...pane.querySelectorAll(".sheet")].at(-1);
  if (!last?.dataset.following || pane.dataset.busy) return;
  pane.dataset.busy = "1";
  const more = pane.querySelector(".next");
  try {
    const answer = await fetch(last.dataset.following);
    const words = await answer.text();
    if (!answer.ok) throw new Error(words.trim());
    const made = document.createElement("template");
    made.innerHTML = words; // a part of our own server
    const sheet = made.content.querySelector(".sheet");
    delete last.dataset.following;
    last.after(sheet);
    prepare(sheet);
    if (!sheet.dataset.following) more?.remove();
    delete pane.dataset.busy;
    ends.disconnect();
    watch();
  } catch (error) { // stays busy: else it would be asked again at once
    if (more) more.textContent = error.message || "The explorer does not answer. Is it still running?";
  }
}

const ends = new IntersectionObserver((seen) => {
  for (const { isIntersecting, target } of seen) {
    if (isIntersecting) grow(target.closest(".pane"));
  }
}, { rootMargin: "0px 0px 400px 0px" });

// The next sheet comes when the last crop of a pane comes near.
function watch() {
  for (const pane of panes) {
    const crop = pane.querySelector(".sheet:last-of-type > li:last-child");
    if (crop) ends.observe(crop);
  }
}

function prepare(sheet) {
  for (const crop of sheet.querySelectorAll(".crop")) crop.tabIndex = -1;
  for (const button of sheet.querySelectorAll(".pick")) button.hidden = false;
  mark(sheet);
}

// The address brings back the sheets that are on the screen.
let waiting = 0;
function remember() {
  const address = new URL(location.href);
  for (const pane of panes) {
    const name = `${pane.dataset.pane}after`;
    const shown = [...pane.querySelectorAll(".sheet")].find(
      (sheet) => sheet.getBoundingClientRect().bottom > 80);
    if (!shown) continue;
    if (shown.dataset.begin) address.searchParams.set(name, shown.dataset.begin);
    else address.searchParams.delete(name);
  }
  if (address.href !== location.href) history.replaceState(history.state, "", address);
}
addEventListener("scroll", () => {
  about.hidden = true;
  clearTimeout(waiting);
  waiting = setTimeout(remember, 300);
}, { passive: true });

// Keys, the pointer and the selection

// What a cell is stands below its crop, or above where there is no room.
function show(crop) {
  about.hidden = !crop;
  if (!crop) return;
  about.textContent = crop.getAttribute("aria-label");
  const place = crop.getBoundingClientRect();
  const most = document.documentElement.clientWidth - about.offsetWidth - 8;
  const below = place.bottom + 6;
  const room = innerHeight - (document.getElementById("annotate")?.offsetHeight ?? 0);
  const top = below + about.offsetHeight < room ? below : place.top - about.offsetHeight - 6;
  about.style.left = `${Math.max(8, Math.min(place.left, most))}px`;
  about.style.top = `${Math.max(4, top)}px`;
}

function go(crop) {
  const pane = crop.closest(".pane");
  for (const other of pane.querySelectorAll('.crop[tabindex="0"]')) other.tabIndex = -1;
  crop.tabIndex = 0;
  crop.focus({ preventScroll: true });
  crop.scrollIntoView({ block: "nearest" });
  requestAnimationFrame(() => requestAnimationFrame(() => show(crop))); // after it has scrolled
}

function perLine(pane) {
  const sheet = pane.querySelector(".sheet");
  return getComputedStyle(sheet).gridTemplateColumns.split(" ").length;
}

function moved(crop, key) {
  const pane = crop.closest(".pane");
  const crops = cropsOf(pane);
  const at = crops.indexOf(crop);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -perLine(pane), ArrowDown: perLine(pane) }[key];
  const to = key === "Home" ? 0 : key === "End" ? crops.length - 1 : at + step;
  if (to < 0 || to >= crops.length) {
    const other = panes[panes.indexOf(pane) + Math.sign(to - at)];
    return Math.abs(step) === 1 && other ? other.querySelector(".crop") : null;
  }
  return crops[to];
}

function toggle(crop) {
  const ids = new Set(selection.ids());
  const id = Number(crop.dataset.cell);
  if (!ids.delete(id)) ids.add(id);
  anchor = crop;
  selection.set(ids);
}

function upTo(crop) {
  const pane = crop.closest(".pane");
  const crops = cropsOf(pane);
  if (!anchor || !pane.contains(anchor)) anchor = crop;
  const [low, high] = [crops.indexOf(anchor), crops.indexOf(crop)].sort((a, b) => a - b);
  const ids = new Set(selection.ids());
  for (const item of crops.slice(low, high + 1)) ids.add(Number(item.dataset.cell));
  selection.set(ids);
}

function mark(root) {
  for (const crop of root.querySelectorAll(".crop")) {
    const is = selection.has(crop.dataset.cell);
    crop.parentElement.classList.toggle("selected", is);
    const button = crop.parentElement.querySelector(".pick");
    button.setAttribute("aria-pressed", is);
  }
}

document.addEventListener("cellstore:selection", () => {
  mark(document);
  const n = selection.size;
  selected.hidden = !n;
  selected.replaceChildren();
  if (n) {
    selected.append(`${n.toLocaleString("en")} selected `);
    if (n <= 1000) {
      const ids = selection.ids();
      const some = (_, at) => `cells=${ids.slice(at * 100, (at + 1) * 100).join(",")}`;
      const listed = Array.from({ length: Math.ceil(n / 100) }, some).join("&");
      selected.append(element("a", { href: `/cells?${listed}&excluded=all&sort=id` }, "Show these"), " ");
    }
    selected.append(element("button", { type: "button", onclick: () => selection.clear() }, "Clear"));
  }
  selected.style.bottom = `${document.getElementById("annotate")?.offsetHeight ?? 0}px`;
});

document.addEventListener("cellstore:annotated", ({ detail }) => {
  if (detail.level !== "cell") return;
  const ids = new Set(detail.ids.map(Number));
  for (const crop of document.querySelectorAll(".crop")) {
    if (!ids.has(Number(crop.dataset.cell))) continue;
    const place = crop.parentElement;
    place.querySelector(".people")?.remove();
    if (!detail.text) continue;
    place.append(element("span", { className: "people" }, detail.text));
  }
});

document.addEventListener("focusin", ({ target }) => {
  const crop = target.closest?.(".crop");
  if (crop) show(crop);
});
document.addEventListener("pointerover", ({ target }) => {
  show(target.closest?.(".sheet li")?.querySelector(".crop"));
});
document.addEventListener("click", (event) => {
  const button = event.target.closest(".pick");
  const crop = (button ? button.parentElement : event.target).closest?.(".sheet li")?.querySelector(".crop");
  if (!crop || !(button || event.shiftKey)) return;
  event.preventDefault();
  if (event.shiftKey) upTo(crop);
  else toggle(crop);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    selection.clear();
    show(null);
  }
  const crop = document.activeElement?.closest?.(".crop");
  if (!crop) return;
  if (event.key === " ") {
    event.preventDefault();
    toggle(crop);
  } else if (/^(Arrow(Left|Right|Up|Down)|Home|End)$/.test(event.key)) {
    event.preventDefault();
    const to = moved(crop, event.key);
    if (to && event.shiftKey) { anchor ??= crop; upTo(to); }
    if (to) go(to);
  }
});

for (const pane of panes) {
  for (const sheet of pane.querySelectorAll(".sheet")) prepare(sheet);
  const first = pane.querySelector(".crop");
  if (first) first.tabIndex = 0;
}

watch();

// How many there are is asked when the first crops have come.
addEventListener("load", async () => {
  for (const place of document.querySelectorAll("[data-count]")) {
    place.textContent = "Counting …";
    try {
      place.textContent = await (await fetch(place.dataset.count)).text();
    } catch {
      place.textContent = "";
    }
  }
});
