// Plate maps: what a well is, its replicates, and the keyboard.

import { element, next_link } from "./page.js";

// The label of the link says the same.
const tip = element("div", { className: "tip", hidden: true, "aria-hidden": "true" });
document.body.append(tip);

function show(well) {
  tip.textContent = well.getAttribute("aria-label");
  tip.hidden = false;
  const box = well.getBoundingClientRect();
  const width = tip.offsetWidth, height = tip.offsetHeight;
  const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), innerWidth - width - 8);
  const above = box.top - height - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
  for (const other of document.querySelectorAll(`.wells a[data-group="${well.dataset.group}"]`)) {
    other.classList.add("same");
  }
}

function hide() {
  tip.hidden = true;
  for (const other of document.querySelectorAll(".wells a.same")) other.classList.remove("same");
}

export function prepare(root) {
  for (const map of root.querySelectorAll(".wells")) {
    [...map.querySelectorAll("a")].forEach((well, at) => { well.tabIndex = at ? -1 : 0; });
    map.addEventListener("keydown", (event) => {
      const found = next_link(event.target.closest("td"), event);
      if (!found) return;
      event.target.tabIndex = -1;
      found.tabIndex = 0;
      found.focus();
    });
    const over = (event) => {
      hide();
      const well = event.target.closest("a");
      if (well) show(well);
    };
    map.addEventListener("pointerover", over);
    map.addEventListener("focusin", over);
    map.addEventListener("pointerleave", hide);
    map.addEventListener("focusout", hide);
  }
}
prepare(document);

// A group of the legend is outlined on the maps.
for (const entry of document.querySelectorAll(".maplegend [data-value]")) {
  entry.addEventListener("pointerenter", () => {
    for (const text of document.querySelectorAll(".wells a > span")) {
      if (text.textContent === entry.dataset.value) text.parentElement.classList.add("same");
    }
  });
  entry.addEventListener("pointerleave", hide);
}
addEventListener("scroll", hide, { passive: true });
