// Arrow keys go from square to square of a confusion matrix, and a lineage begins at its subject.

import { next_link } from "./page.js";

const subject = document.querySelector(".graph .subject");
if (subject) {
  const graph = subject.closest(".graph");
  const { left, width } = subject.getBoundingClientRect();
  graph.scrollLeft += left + width / 2 - graph.getBoundingClientRect().left - graph.clientWidth / 2;
}

document.addEventListener("keydown", (event) => {
  next_link(event.target.closest("table.matrix td"), event)?.focus();
});
