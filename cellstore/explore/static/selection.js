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
  ids() { return [...chosen]; },
  get size() { return chosen.size; },
  set(ids, of = "cell") {
    level = of;
    chosen = new Set([...ids].map(Number));
    tell();
  },
  clear() { if (chosen.size) selection.set([], level); },
};
