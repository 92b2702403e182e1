// Fields of a well are selected with the space bar or a shift-click, for labels and exclusions.

import { element } from "./page.js";
import { selection } from "./selection.js";

const fields = [...document.querySelectorAll(".montage a[data-image]")];

function toggle(field) {
  const ids = new Set(selection.level === "image" ? selection.ids() : []);
  const id = Number(field.dataset.image);
  if (!ids.delete(id)) ids.add(id);
  selection.set(ids, "image");
}

document.addEventListener("click", (event) => {
  const field = event.target.closest(".montage a[data-image]");
  if (!field || !event.shiftKey) return;
  event.preventDefault();
  toggle(field);
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") selection.clear();
  const field = event.target.closest(".montage a[data-image]");
  if (!field || event.key !== " ") return;
  event.preventDefault();
  toggle(field);
});

document.addEventListener("cellstore:selection", ({ detail }) => {
  const ids = detail.level === "image" ? detail.ids : [];
  for (const field of fields) {
    const chosen = ids.includes(Number(field.dataset.image));
    field.classList.toggle("selected", chosen);
    field.setAttribute("aria-pressed", chosen);
  }
});

// What was said of a field or of the well stands on the page at once.
document.addEventListener("cellstore:annotated", ({ detail }) => {
  const places = detail.level === "image"
    ? fields.filter((field) => detail.ids.map(Number).includes(Number(field.dataset.image)))
        .map((field) => field.nextElementSibling)
    : detail.level === "well" ? [document.querySelector(".titled")] : [];
  for (const place of places) {
    let said = place.querySelector(".said");
    if (!said) {
      said = element("b", { className: "said" });
      place.append(" ", said);
    }
    said.textContent = detail.text;
  }
});
