// What all pages share: parts that come later, buttons that copy, forms that send themselves.

document.documentElement.classList.add("js");

export function element(tag, given = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...inside);
  return made;
}

export function drawn(tag, attributes, ...inside) {
  // An element of SVG.
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...inside);
  return made;
}

export function shaders(gl, vertex, fragment) {
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  gl.useProgram(program);
  const places = {};
  return { program, uniform: (name) => (places[name] ??= gl.getUniformLocation(program, name)) };
}

export async function fill(place, address, is_wanted = () => true) {
  // Put a part of a page of our own server into a place, or the sentence that says why not.
  let words = "The explorer does not answer. Is it still running?", ok = false;
  try {
    const answer = await fetch(address);
    words = (await answer.text()).trim();
    ok = answer.ok;
  } catch { /* said below */ }
  if (!is_wanted()) return false;
  if (ok) place.innerHTML = words;
  else place.textContent = words;
  place.removeAttribute("aria-busy");
  return ok;
}

export function one_at_a_time(cancel, tell) {
  // Does work that the button, or the next work, ends; `tell` hears how many seconds it has taken.
  let running = null;
  cancel.addEventListener("click", () => running?.abort());
  return async (work) => {
    running?.abort();
    const mine = running = new AbortController(), began = performance.now();
    const clock = setInterval(() => tell(`${((performance.now() - began) / 1000).toFixed(1)} s`), 200);
    cancel.hidden = false;
    const words = await work(mine.signal, () => running === mine).catch((error) => {
      if (mine.signal.aborted) return "Cancelled.";
      return error instanceof TypeError ? "The explorer does not answer. Is it still running?" : error.message;
    });
    clearInterval(clock);
    if (running !== mine) return null; // other work has begun
    running = null;
    cancel.hidden = true;
    return words;
  };
}

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export function next_link(cell, event) {
  // The link in the next cell of a table, in the direction of an arrow key, that has one.
  const step = STEPS[event.key];
  if (!cell || !step || event.ctrlKey || event.metaKey || event.altKey) return null;
  event.preventDefault(); // the page would scroll
  const rows = cell.closest("table").rows;
  let row = cell.parentElement.rowIndex, column = cell.cellIndex;
  for (;;) {
    row += step[0];
    column += step[1];
    const there = rows[row]?.cells[column], link = there?.querySelector("a");
    if (link || !there) return link ?? null;
  }
}

for (const place of document.querySelectorAll("[data-part]")) fill(place, place.dataset.part);

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const words = button.textContent;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select the text to copy it";
  }
  setTimeout(() => { button.textContent = words; }, 2000);
});

for (const button of document.querySelectorAll("[data-back]")) {
  button.hidden = history.length < 2;
  button.addEventListener("click", () => history.back());
}

document.addEventListener("change", (event) => {
  const form = event.target.closest("form[data-auto]");
  const typed = event.target.matches("[type=text], [type=search]:not([list])");
  if (form && !typed) form.requestSubmit();
});
