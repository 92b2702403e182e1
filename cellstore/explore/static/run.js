// Arrow keys go from square to square of a confusion matrix, and a lineage begins at its subject.

const subject = document.querySelector(".graph .subject");
if (subject) {
  const graph = subject.closest(".graph");
  const { left, width } = subject.getBoundingClientRect();
  graph.scrollLeft += left + width / 2 - graph.getBoundingClientRect().left - graph.clientWidth / 2;
}

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

document.addEventListener("keydown", (event) => {
  const step = STEPS[event.key];
  const square = event.target.closest("table.matrix td");
  if (!step || !square || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault(); // the page would scroll
  const rows = square.closest("table").rows;
  let row = square.parentElement.rowIndex + step[0];
  let column = square.cellIndex + step[1];
  // Squares without images have no link: on to the next one that has.
  while (rows[row]?.cells[column]) {
    const link = rows[row].cells[column].querySelector("a");
    if (link) return link.focus();
    row += step[0];
    column += step[1];
  }
});
