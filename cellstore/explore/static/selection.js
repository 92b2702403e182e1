// Which cells, or images, are selected; other scripts of the page listen to "cellstore:selection".

let level = "cell";
let chosen = new Set();

function tell() {
  const detail = { level, ids: [...chosen] };
  document.dispatchEvent(new CustomEvent("cellstore:selection", { detail }));
}

export const selection = {
  get level() { return level; },
  has(id) { return chosen.has(Number(id)); },
  // What is selected; if nothing is, the crop that has the focus.
  ids() {
    if (chosen.size || level !== "cell") return [...chosen];
    const crop = document.activeElement?.closest?.("[data-cell]");
    return crop ? [Number(crop.dataset.cell)] : [];
  },
  get size() { return chosen.size; },
  set(ids, of = "cell") {
    level = of;
    chosen = new Set([...ids].map(Number));
    tell();
  },
  clear() { if (chosen.size) selection.set([], level); },
};
