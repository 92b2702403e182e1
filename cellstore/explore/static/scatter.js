// A scatter plot: points drawn by WebGL2, or their density; zoom, names, lasso and what is in it.

import { drawn, element, fill, one_at_a_time, shaders } from "./page.js";
import { prepare } from "./plate.js";
import { selection } from "./selection.js";

const data = JSON.parse(document.getElementById("scatter-data")?.textContent || "null");
const BEYOND = { others: 8, controls: 9, nothing: 10 };
const LEFT = 80, BOTTOM = 46, TOP = 10, RIGHT = 12;
const VIRIDIS = ["440154", "481a6c", "472f7d", "414487", "39568c", "31688e", "2a788e", "23888e",
  "1f988b", "22a884", "35b779", "54c568", "7ad151", "a5db36", "d2e21b", "fde725"];
const WAIT_MS = 500, REFETCH_MS = 350, NEAR = 9, BANDS = 512, CELLS = 256;

const VERTEX = `#version 300 es
in vec2 place; in float shade; in float picked;
uniform vec4 view; uniform float size; uniform float selecting; uniform sampler2D palette; uniform float opacity;
out vec4 colour;
void main() {
  vec4 found = texelFetch(palette, ivec2(int(shade), 0), 0);
  float strong = selecting > 0.5 ? (picked > 0.5 ? 1.0 : 0.13) : 1.0;
  colour = vec4(found.rgb, found.a * opacity * strong);
  if (selecting > 0.5 && picked > 0.5) colour.a = max(colour.a, 0.85 * found.a);
  vec2 at = place * view.xy + view.zw;
  gl_Position = found.a > 0.0 ? vec4(at, 0.0, 1.0) : vec4(2.0, 2.0, 0.0, 1.0);
  gl_PointSize = size;
}`;
const FRAGMENT = `#version 300 es
precision mediump float;
in vec4 colour; out vec4 shown;
void main() {
  float far = length(gl_PointCoord - 0.5) * 2.0;
  float soft = 1.0 - smoothstep(0.75, 1.0, far);
  if (soft <= 0.0) discard;
  shown = vec4(colour.rgb, 1.0) * colour.a * soft;
}`;

const plot = document.getElementById("plot");
if (data && plot) start();

function start() {
  const part = (name) => document.querySelector(`[data-${name}]`);
  const canvas = part("points"), density = part("density"), axes = part("axes"), tip = part("tip");
  const state = part("state"), cancel = part("cancel"), form = document.getElementById("axes");
  const place = document.getElementById("selection");
  const address = new URLSearchParams(location.search);
  const hidden = new Set((address.get("hide") || "").split("|").filter(Boolean));
  const gl = canvas.getContext("webgl2", { antialias: false, premultipliedAlpha: true, preserveDrawingBuffer: true });
  let shown = null;     // what was loaded
  let view = null;      // [x from, x to, y from, y to] in the units of the axes
  let whole_view = null;
  let tool = "lasso", picked = null, drawing = false, refetch = 0;
  let wanted_view = numbers_of(address.get("view"));
  const dark = matchMedia("(prefers-color-scheme: dark)");

  if (!gl) {
    state.textContent = "This browser has no WebGL2, which the points need.";
    return;
  }
  const drawer = make_drawer(gl);

  // The address

  function numbers_of(text) {
    const found = (text || "").split(",").map(Number);
    return found.length === 4 && found.every(Number.isFinite) && found[1] > found[0] && found[3] > found[2] ? found : null;
  }

  function keep_address() {
    const zoomed = view && whole_view && view.some((value, at) => Math.abs(value - whole_view[at]) > 1e-9 * Math.abs(whole_view[at % 2 ? at : at + 1] - whole_view[at % 2 ? at - 1 : at] || 1));
    set("view", zoomed ? view.map((value) => Number(value.toPrecision(7))).join(",") : "");
    set("hide", [...hidden].join("|"));
    const text = address.toString();
    history.replaceState(null, "", text ? `?${text}` : location.pathname);
  }

  function set(name, value) { if (value) address.set(name, value); else address.delete(name); }

  form.addEventListener("change", (event) => {
    const given = new URLSearchParams();
    for (const [name, value] of new FormData(form)) {
      // What another kind of points has on its axes is not of this one.
      if (event.target.name === "profiles" && ["x", "y", "colour", "run"].includes(name)) continue;
      if (value !== "") given.append(name, value);
    }
    location.assign(`/scatter?${given}`);
  });

  // Loading

  let progress = "";
  const working = one_at_a_time(cancel, (seconds) => { state.textContent = `${progress} … ${seconds}`; });

  async function load(window_asked) {
    progress = `Reading ${data.unit}`;
    const asked = new URLSearchParams(address);
    for (const name of ["view", "hide", "lasso"]) asked.delete(name);
    if (window_asked) asked.set("window", window_asked.join(","));
    const words = await working(async (signal, is_mine) => {
      for (;;) {
        const answer = await fetch(`/scatter/points?${asked}`, { signal });
        if (answer.status !== 202) {
          if (!answer.ok) return (await answer.text()).trim();
          const bytes = await answer.arrayBuffer();
          if (!is_mine()) return "";
          take(bytes);
          return shown.head.n ? "" : `No ${data.unit} have both values.`;
        }
        ({ progress } = await answer.json());
        await new Promise((done) => setTimeout(done, WAIT_MS));
        signal.throwIfAborted();
      }
    });
    if (words === null) return;
    state.textContent = words;
    plot.dataset.ready = words || "yes";
  }

  function take(bytes) {
    const length = new DataView(bytes).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, length)));
    const at = 4 + length;
    const first = shown === null;
    shown = { head };
    if (head.kind === "density") {
      shown.counts = new Float64Array(bytes, at, head.bins * head.bins);
      shown.window = head.window;
      shown.picture = density_picture(shown.counts, head.bins);
    } else {
      const n = head.n;
      shown.ids = new Float64Array(bytes, at, n);
      shown.x = new Float32Array(bytes, at + 8 * n, n);
      shown.y = new Float32Array(bytes, at + 12 * n, n);
      shown.shades = head.colour.groups ? new Uint8Array(bytes, at + 16 * n, n)
        : shades_of(new Float32Array(bytes, at + 16 * n, n), head.colour);
      shown.limits = limits_of(shown.x, shown.y);
      shown.grid = make_grid(shown);
      drawer.fill(shown);
    }
    if (first) {
      whole_view = padded(head.kind === "density" ? head.window : shown.limits);
      view = wanted_view || whole_view.slice();
    }
    picked = null;
    part("notes").textContent = head.notes.join(" ");
    legend();
    recolour();
    if (first && address.get("lasso")) restore();
    if (first && wanted_view) plan_refetch();
    draw();
  }

  function padded([x0, x1, y0, y1]) {
    const wide = x1 - x0 || Math.abs(x0) || 1, high = y1 - y0 || Math.abs(y0) || 1;
    return [x0 - 0.03 * wide, x1 + 0.03 * wide, y0 - 0.03 * high, y1 + 0.03 * high];
  }

  function plan_refetch() {
    // Where not all points are here, others come for the part that is looked at.
    if (!shown || shown.head.kind === "points" && shown.head.whole) return;
    const inside = shown.window && shown.head.kind === "points" && view[0] >= shown.window[0] && view[1] <= shown.window[1] && view[2] >= shown.window[2] && view[3] <= shown.window[3];
    if (inside) return;
    clearTimeout(refetch);
    refetch = setTimeout(async () => {
      const asked = view.slice();
      await load(asked);
      if (shown && shown.head.kind === "points") shown.window = asked;
    }, REFETCH_MS);
  }

  // Colours

  function theme(name) { return getComputedStyle(plot).getPropertyValue(name).trim(); }

  function recolour() {
    const palette = new Uint8Array(4 * 256);
    const put = (at, hex) => palette.set([...rgb(hex), 255], 4 * at);
    const groups = shown.head.colour.groups;
    if (groups) {
      for (const group of groups) if (!hidden.has(group.name)) put(group.code, colour_of(group));
    } else if (shown.head.kind === "points") {
      put(0, theme("--point-nothing"));
      for (let at = 1; at < 256; at++) put(at, viridis((at - 1) / 254));
    }
    drawer.colour(palette);
    draw();
  }

  function colour_of(group) {
    if (group.code === BEYOND.others) return theme("--point-others");
    if (group.code === BEYOND.controls) return theme("--point-controls");
    if (group.code === BEYOND.nothing) return theme("--point-nothing");
    return group.colour;
  }

  function legend() {
    const { head } = shown;
    const list = part("legend");
    list.replaceChildren();
    part("legend-title").textContent = head.kind === "density" ? "Density" : head.colour.title;
    part("count").textContent = `${head.n.toLocaleString("en")} ${head.unit}${head.kind === "density" ? "" : head.whole ? "" : " in this part"}`;
    if (head.kind === "density") {
      list.append(ramp("1", `${head.most || Math.max(...shown.counts).toLocaleString("en")} ${head.unit}`));
      list.append(element("p", { className: "soft" }, "These are too many to draw each. Zoom in until there are at most 1,000,000: then they are points with colours, and can be selected."));
    } else if (head.colour.groups) {
      for (const group of head.colour.groups) list.append(entry(group));
    } else {
      list.append(ramp(brief(head.colour.low), brief(head.colour.high)));
      const missing = head.n - head.colour.known;
      if (missing) list.append(element("p", { className: "soft" }, `${missing.toLocaleString("en")} have no value (grey).`));
    }
  }

  function entry(group) {
    const button = element("button", { type: "button", className: "legend-entry", title: "Show or hide", "aria-pressed": !hidden.has(group.name) },
      element("i", { style: `background: ${colour_of(group)}` }), element("span", {}, group.name),
      element("span", { className: "soft" }, group.count.toLocaleString("en")));
    button.addEventListener("click", () => {
      if (hidden.has(group.name)) hidden.delete(group.name); else hidden.add(group.name);
      button.setAttribute("aria-pressed", !hidden.has(group.name));
      recolour();
      keep_address();
    });
    return button;
  }

  function ramp(low, high) {
    const colours = VIRIDIS.map((hex) => `#${hex}`).join(",");
    return element("div", { className: "legend-ramp" },
      element("div", { style: `background: linear-gradient(to right, ${colours})` }),
      element("div", {}, element("span", {}, low), element("span", {}, high)));
  }

  function is_hidden() {
    // By shade: whether points of it cannot be seen.
    const found = new Uint8Array(256);
    for (const group of shown.head.colour.groups || []) if (hidden.has(group.name)) found[group.code] = 1;
    return found;
  }

  dark.addEventListener("change", () => { if (shown) { legend(); recolour(); } });

  // Drawing

  const inner = () => ({ width: Math.max(10, plot.clientWidth - LEFT - RIGHT), height: Math.max(10, plot.clientHeight - TOP - BOTTOM) });
  const to_x = (value) => LEFT + (value - view[0]) / (view[1] - view[0]) * inner().width;
  const to_y = (value) => TOP + (view[3] - value) / (view[3] - view[2]) * inner().height;
  const from_x = (pixel) => view[0] + (pixel - LEFT) / inner().width * (view[1] - view[0]);
  const from_y = (pixel) => view[3] - (pixel - TOP) / inner().height * (view[3] - view[2]);

  function draw() {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => { drawing = false; if (view) draw_now(); });
  }

  function draw_now() {
    const { width, height } = inner();
    const ratio = devicePixelRatio || 1;
    for (const item of [canvas, density]) {
      Object.assign(item.style, { left: `${LEFT}px`, top: `${TOP}px`, width: `${width}px`, height: `${height}px` });
      const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
      if (item.width !== wide || item.height !== high) { item.width = wide; item.height = high; }
    }
    const flat = density.getContext("2d");
    flat.clearRect(0, 0, density.width, density.height);
    if (shown.head.kind === "density") {
      const [x0, x1, y0, y1] = shown.window;
      flat.imageSmoothingEnabled = false;
      const left = (to_x(x0) - LEFT) * ratio, top = (to_y(y1) - TOP) * ratio;
      flat.drawImage(shown.picture, left, top, (to_x(x1) - LEFT) * ratio - left, (to_y(y0) - TOP) * ratio - top);
      drawer.clear();
    } else {
      drawer.draw(view, picked !== null, ratio, hidden.size);
    }
    draw_axes(width, height);
  }

  function draw_axes(width, height) {
    axes.setAttribute("viewBox", `0 0 ${plot.clientWidth} ${plot.clientHeight}`);
    const parts = [];
    const line = (x1, y1, x2, y2, name) => parts.push(drawn("line", { x1, y1, x2, y2, class: name }));
    const words = (x, y, text, anchor, more = {}) => parts.push(drawn("text", { x, y, "text-anchor": anchor, ...more }, text));
    for (const value of ticks(view[0], view[1], Math.max(2, width / 90))) {
      const x = to_x(value);
      line(x, TOP, x, TOP + height, "grid");
      words(x, TOP + height + 16, tick_words(value, view[1] - view[0]), "middle");
    }
    for (const value of ticks(view[2], view[3], Math.max(2, height / 60))) {
      const y = to_y(value);
      line(LEFT, y, LEFT + width, y, "grid");
      words(LEFT - 7, y + 4, tick_words(value, view[3] - view[2]), "end");
    }
    line(LEFT, TOP + height, LEFT + width, TOP + height, "axis");
    line(LEFT, TOP, LEFT, TOP + height, "axis");
    const [across, up] = shown.head.titles;
    words(LEFT + width / 2, TOP + height + 38, cut(across, width / 7), "middle", { class: "title" });
    words(0, 0, cut(up, height / 7), "middle", { class: "title", transform: `translate(14 ${TOP + height / 2}) rotate(-90)` });
    axes.replaceChildren(...parts);
    const path = `M${lasso.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}Z`;
    part("lasso").replaceChildren(...(lasso.length ? [drawn("path", { d: path })] : []));
  }

  new ResizeObserver(() => { if (shown) draw(); }).observe(plot);

  // Zoom and pan

  function look(found) {
    const least = (at) => 1e-6 * (whole_view[at + 1] - whole_view[at]);
    for (const at of [0, 2]) {
      if (found[at + 1] - found[at] < least(at)) return;
      if (found[at + 1] - found[at] > 20 * (whole_view[at + 1] - whole_view[at])) return;
    }
    view = found;
    tip.hidden = true;
    keep_address();
    plan_refetch();
    draw();
  }

  function zoom(factor, x = from_x(LEFT + inner().width / 2), y = from_y(TOP + inner().height / 2)) {
    look([x - (x - view[0]) * factor, x + (view[1] - x) * factor, y - (y - view[2]) * factor, y + (view[3] - y) * factor]);
  }

  function move(dx, dy) {
    const wide = (view[1] - view[0]) * dx, high = (view[3] - view[2]) * dy;
    look([view[0] + wide, view[1] + wide, view[2] + high, view[3] + high]);
  }

  plot.addEventListener("wheel", (event) => {
    if (!shown) return;
    event.preventDefault();
    const box = plot.getBoundingClientRect();
    zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) / 250), from_x(event.clientX - box.left), from_y(event.clientY - box.top));
  }, { passive: false });

  for (const button of document.querySelectorAll("[data-do]")) {
    button.addEventListener("click", () => { if (shown) act(button.dataset.do); });
  }

  function act(name) {
    if (name === "in") zoom(1 / 1.5);
    else if (name === "out") zoom(1.5);
    else look(whole_view.slice());
  }

  function choose_tool(name) {
    tool = name;
    for (const button of document.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === name));
    plot.dataset.with = name;
  }
  for (const button of document.querySelectorAll("[data-tool]")) button.addEventListener("click", () => choose_tool(button.dataset.tool));
  choose_tool(tool);

  plot.addEventListener("keydown", (event) => {
    if (!shown || event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = {
      "+": () => act("in"), "=": () => act("in"), "-": () => act("out"), "0": () => act("all"),
      ArrowLeft: () => move(-0.1, 0), ArrowRight: () => move(0.1, 0), ArrowUp: () => move(0, 0.1), ArrowDown: () => move(0, -0.1),
      l: () => choose_tool("lasso"), r: () => choose_tool("rectangle"), p: () => choose_tool("pan"), Escape: () => clear(),
    };
    if (event.key in keys) { event.preventDefault(); keys[event.key](); }
  });

  // Names of points

  let over = -1, naming = 0;

  function nearest(px, py) {
    const { x, y, shades, grid } = shown;
    const gone = is_hidden();
    const cell = (value, low, size) => Math.min(CELLS - 1, Math.max(0, Math.floor((value - low) / size * CELLS)));
    const [x0, x1, y0, y1] = shown.limits;
    const left = cell(from_x(px - NEAR), x0, x1 - x0 || 1), right = cell(from_x(px + NEAR), x0, x1 - x0 || 1);
    const bottom = cell(from_y(py + NEAR), y0, y1 - y0 || 1), top = cell(from_y(py - NEAR), y0, y1 - y0 || 1);
    let best = -1, least = NEAR * NEAR;
    for (let row = bottom; row <= top; row++) {
      for (let at = grid.starts[row * CELLS + left]; at < grid.starts[row * CELLS + right + 1]; at++) {
        const index = grid.order[at];
        if (gone[shades[index]]) continue;
        const dx = to_x(x[index]) - px, dy = to_y(y[index]) - py;
        if (dx * dx + dy * dy < least) { least = dx * dx + dy * dy; best = index; }
      }
    }
    return best;
  }

  async function name_point(index) {
    const asked = new URLSearchParams({ id: shown.ids[index] });
    if (data.profiles) asked.set("profiles", data.profiles);
    const answer = await fetch(`/scatter/point?${asked}`);
    if (!answer.ok || over !== index) return;
    const { lines, url } = await answer.json();
    const { x, y, head } = shown;
    lines.push(`${head.titles[0]}: ${brief(x[index])}`, `${head.titles[1]}: ${brief(y[index])}`);
    const group = head.colour.groups?.find(({ code }) => code === shown.shades[index]);
    if (group && !["treatment", "plate"].includes(head.colour.title)) lines.push(`${head.colour.title}: ${group.name}`);
    const rows = lines.map((line, at) => element(at ? "div" : "b", {}, line));
    tip.replaceChildren(...rows, element("a", { href: url }, "Open"));
    tip.hidden = false;
    const left = to_x(x[index]), top = to_y(y[index]);
    tip.style.left = `${Math.max(4, Math.min(left + 10, plot.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${top + 12 + tip.offsetHeight > plot.clientHeight ? Math.max(2, top - tip.offsetHeight - 10) : top + 12}px`;
  }

  function hover(px, py) {
    if (!shown || shown.head.kind !== "points") return;
    const found = nearest(px, py);
    if (found === over) return;
    over = found;
    clearTimeout(naming);
    if (found >= 0) naming = setTimeout(() => name_point(found), 60);
    else naming = setTimeout(() => { if (over < 0) tip.hidden = true; }, 400);
  }

  // Lasso

  let lasso = [], drag = null;

  plot.addEventListener("pointerdown", (event) => {
    if (!shown || event.target.closest(".scatter-tip") || event.button > 1) return;
    const box = plot.getBoundingClientRect();
    const px = event.clientX - box.left, py = event.clientY - box.top;
    const pans = tool === "pan" || event.shiftKey || event.button === 1 || shown.head.kind === "density";
    drag = { px, py, pans, view: view.slice(), moved: false };
    lasso = [];
    plot.setPointerCapture(event.pointerId);
  });

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const px = event.clientX - box.left, py = event.clientY - box.top;
    if (!drag) { if (!event.target.closest(".scatter-tip")) hover(px, py); return; }
    if (!drag.moved && Math.hypot(px - drag.px, py - drag.py) < 3) return;
    drag.moved = true;
    tip.hidden = true;
    if (drag.pans) {
      const dx = (px - drag.px) / inner().width * (view[1] - view[0]), dy = (py - drag.py) / inner().height * (view[3] - view[2]);
      look([drag.view[0] - dx, drag.view[1] - dx, drag.view[2] + dy, drag.view[3] + dy]);
    } else if (tool === "rectangle") {
      lasso = [[drag.px, drag.py], [px, drag.py], [px, py], [drag.px, py]];
      draw();
    } else {
      if (!lasso.length) lasso.push([drag.px, drag.py]);
      const [lx, ly] = lasso[lasso.length - 1];
      if (Math.hypot(px - lx, py - ly) >= 2) lasso.push([px, py]);
      draw();
    }
  });

  plot.addEventListener("pointerup", () => {
    const ended = drag;
    drag = null;
    if (!ended || ended.pans || !ended.moved || lasso.length < 3) { lasso = []; draw(); return; }
    select(lasso.map(([x, y]) => [from_x(x), from_y(y)]));
    lasso = [];
  });
  plot.addEventListener("pointercancel", () => { drag = null; lasso = []; draw(); });

  async function select(polygon) {
    const began = performance.now();
    const mask = inside(polygon, shown.x, shown.y, shown.shades, is_hidden());
    const ids = shown.ids.filter((_, at) => mask[at]), n = ids.length;
    if (n === 0) { state.textContent = "Nothing is within."; clear(); return; }
    // What is selected can be labelled, where the explorer writes.
    if (!data.profiles) selection.set(n <= data.most ? ids : [], "cell");
    show_picked(mask);
    plot.dataset.selected = String(n);
    state.textContent = `${n.toLocaleString("en")} ${data.unit} selected`;
    const asked = new URLSearchParams(data.profiles ? { profiles: data.profiles } : {});
    const body = bits_of(ids);
    const headers = { "X-CSRF-Token": document.querySelector('meta[name="csrf"]').content, "Content-Type": "application/octet-stream" };
    const answer = await fetch(`/selection?${asked}`, { method: "POST", body, headers });
    if (!answer.ok) { state.textContent = (await answer.text()).trim(); return; }
    const { selection: name } = await answer.json();
    set("lasso", name);
    keep_address();
    await show_selection(name, began);
  }

  function show_picked(mask) { picked = mask; drawer.pick(mask); draw(); }

  async function show_selection(name, began) {
    // The pictures are there first; what they are made of is counted beside them.
    const named = encodeURIComponent(name);
    const gallery = document.createElement("div"), about = document.createElement("div");
    place.replaceChildren(about, gallery);
    const counted = fill(about, `/scatter/selected?selection=${named}&excluded=all`);
    if (data.gallery) await fill(gallery, `/cells/more?selection=${named}&beside=none&excluded=all`);
    else await counted;
    if (began) plot.dataset.lassoMs = String(Math.round(performance.now() - began));
    await counted;
    prepare(about);
    about.querySelector("[data-clear]")?.addEventListener("click", () => { clear(); plot.focus(); });
    about.querySelector("#selection-gallery")?.append(gallery);
  }

  async function restore() {
    const asked = new URLSearchParams({ selection: address.get("lasso"), excluded: "all" });
    if (data.profiles) asked.set("profiles", data.profiles);
    const answer = await fetch(`/scatter/selected.bin?${asked}`);
    if (!answer.ok) { state.textContent = (await answer.text()).trim(); set("lasso", ""); keep_address(); return; }
    const ids = new Set(ids_of(new Uint8Array(await answer.arrayBuffer())));
    if (!data.profiles) selection.set(ids.size <= data.most ? ids : [], "cell");
    show_picked(Uint8Array.from(shown.ids, (id) => (ids.has(id) ? 1 : 0)));
    await show_selection(address.get("lasso"), 0);
  }

  function clear() {
    picked = null;
    selection.clear();
    delete plot.dataset.selected;
    place.replaceChildren();
    set("lasso", "");
    keep_address();
    draw();
  }

  load(null);
}

// What needs no page

function make_drawer(gl) {
  const { program, uniform } = shaders(gl, VERTEX, FRAGMENT);
  const buffers = { place: gl.createBuffer(), shade: gl.createBuffer(), picked: gl.createBuffer() };
  const palette = gl.createTexture();
  const attributes = gl.createVertexArray();
  let n = 0, middle = [0, 0], half = [1, 1];
  gl.bindVertexArray(attributes);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);

  function put(name, values, size, kind) {
    const index = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffers[name]);
    gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(index);
    gl.vertexAttribPointer(index, size, kind, false, 0, 0);
  }

  return {
    fill({ x, y, shades, limits }) {
      // Around 0 and of size 1: a float has too few digits for a small part of large numbers.
      n = x.length;
      middle = [(limits[0] + limits[1]) / 2, (limits[2] + limits[3]) / 2];
      half = [(limits[1] - limits[0]) / 2 || 1, (limits[3] - limits[2]) / 2 || 1];
      const places = new Float32Array(2 * n);
      for (let at = 0; at < n; at++) {
        places[2 * at] = (x[at] - middle[0]) / half[0];
        places[2 * at + 1] = (y[at] - middle[1]) / half[1];
      }
      put("place", places, 2, gl.FLOAT);
      put("shade", shades, 1, gl.UNSIGNED_BYTE);
      put("picked", new Uint8Array(n), 1, gl.UNSIGNED_BYTE);
    },
    pick(mask) { put("picked", mask, 1, gl.UNSIGNED_BYTE); },
    colour(values) {
      gl.bindTexture(gl.TEXTURE_2D, palette);
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, values);
      for (const name of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, name, gl.NEAREST);
    },
    clear() { gl.clearColor(0, 0, 0, 0); gl.clear(gl.COLOR_BUFFER_BIT); },
    draw(view, selecting, ratio) {
      gl.viewport(0, 0, gl.drawingBufferWidth, gl.drawingBufferHeight);
      this.clear();
      const wide = view[1] - view[0], high = view[3] - view[2];
      const scale = [2 * half[0] / wide, 2 * half[1] / high];
      const shift = [(2 * middle[0] - view[0] - view[1]) / wide, (2 * middle[1] - view[2] - view[3]) / high];
      gl.uniform4f(uniform("view"), scale[0], scale[1], shift[0], shift[1]);
      // Fewer points are larger; also those of a part that is looked at closely.
      const seen = n / Math.max(1, scale[0] * scale[1]);
      const size = Math.max(2, Math.min(9, 22 - 3.6 * Math.log10(Math.max(10, seen))));
      gl.uniform1f(uniform("size"), size * ratio);
      gl.uniform1f(uniform("opacity"), seen > 200000 ? 0.35 : seen > 20000 ? 0.55 : 0.8);
      gl.uniform1f(uniform("selecting"), selecting ? 1 : 0);
      gl.drawArrays(gl.POINTS, 0, n);
    },
  };
}

export function inside(polygon, x, y, shades, gone) {
  // Even-odd rule. The edges are sorted into bands, so that a point meets only those at its height.
  const mask = new Uint8Array(x.length);
  let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
  for (const [px, py] of polygon) { x0 = Math.min(x0, px); x1 = Math.max(x1, px); y0 = Math.min(y0, py); y1 = Math.max(y1, py); }
  const band = (value) => Math.min(BANDS - 1, Math.max(0, Math.floor((value - y0) / (y1 - y0 || 1) * BANDS)));
  const bands = Array.from({ length: BANDS }, () => []);
  polygon.forEach(([ax, ay], at) => {
    const [bx, by] = polygon[(at + 1) % polygon.length];
    for (let number = band(Math.min(ay, by)); number <= band(Math.max(ay, by)); number++) bands[number].push(ax, ay, bx, by);
  });
  for (let at = 0; at < x.length; at++) {
    const px = x[at], py = y[at];
    if (px < x0 || px > x1 || py < y0 || py > y1 || gone[shades[at]]) continue;
    const edges = bands[band(py)];
    let odd = 0;
    for (let edge = 0; edge < edges.length; edge += 4) {
      const ay = edges[edge + 1], by = edges[edge + 3];
      if (ay > py !== by > py && px < edges[edge] + (py - ay) / (by - ay) * (edges[edge + 2] - edges[edge])) odd ^= 1;
    }
    mask[at] = odd;
  }
  return mask;
}

// A selection travels as bits: of id N bit N % 8 of byte N / 8.
function bits_of(ids) {
  const bits = new Uint8Array(Math.floor(ids.reduce((most, id) => Math.max(most, id), 0) / 8) + 1);
  for (const id of ids) bits[Math.floor(id / 8)] |= 1 << id % 8;
  return bits;
}

function ids_of(bits) {
  const ids = [];
  bits.forEach((byte, at) => { for (let bit = 0; byte >> bit; bit++) if (byte >> bit & 1) ids.push(8 * at + bit); });
  return ids;
}

function make_grid({ x, y, limits }) {
  // The points by the cell of a grid that they are in: order[starts[cell]..starts[cell + 1]].
  const [x0, x1, y0, y1] = limits;
  const wide = x1 - x0 || 1, high = y1 - y0 || 1;
  const cells = new Uint32Array(x.length), starts = new Uint32Array(CELLS * CELLS + 1);
  for (let at = 0; at < x.length; at++) {
    const column = Math.min(CELLS - 1, Math.floor((x[at] - x0) / wide * CELLS)), row = Math.min(CELLS - 1, Math.floor((y[at] - y0) / high * CELLS));
    cells[at] = row * CELLS + column;
    starts[cells[at] + 1]++;
  }
  for (let cell = 0; cell < CELLS * CELLS; cell++) starts[cell + 1] += starts[cell];
  const next = starts.slice(), order = new Uint32Array(x.length);
  for (let at = 0; at < x.length; at++) order[next[cells[at]]++] = at;
  return { starts, order };
}

function limits_of(x, y) {
  let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
  for (let at = 0; at < x.length; at++) {
    if (x[at] < x0) x0 = x[at];
    if (x[at] > x1) x1 = x[at];
    if (y[at] < y0) y0 = y[at];
    if (y[at] > y1) y1 = y[at];
  }
  return x.length ? [x0, x1, y0, y1] : [0, 1, 0, 1];
}

function shades_of(values, { low, high }) {
  return Uint8Array.from(values, (value) => (Number.isFinite(value) ? 1 + Math.round(254 * Math.min(1, Math.max(0, (value - low) / (high - low || 1)))) : 0));
}

function density_picture(counts, bins) {
  let most = 1;
  for (const count of counts) if (count > most) most = count;
  const picture = new ImageData(bins, bins);
  for (let row = 0; row < bins; row++) {
    for (let column = 0; column < bins; column++) {
      const count = counts[row * bins + column];
      if (!count) continue;
      const at = 4 * ((bins - 1 - row) * bins + column);
      picture.data.set([...rgb(viridis(most > 1 ? Math.log(count) / Math.log(most) : 1)), 255], at);
    }
  }
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = bins;
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

function viridis(share) {
  const at = Math.min(1, Math.max(0, share)) * (VIRIDIS.length - 1), first = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const low = rgb(VIRIDIS[first]), high = rgb(VIRIDIS[first + 1]);
  return low.map((value, index) => Math.round(value + (high[index] - value) * (at - first)).toString(16).padStart(2, "0")).join("");
}

function rgb(hex) {
  const text = hex.replace("#", "");
  return [0, 2, 4].map((at) => parseInt(text.slice(at, at + 2), 16));
}

function ticks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high; at++) found.push(at * step);
  return found;
}

function tick_words(value, span) {
  if (value !== 0 && (Math.abs(value) >= 1e6 || span < 1e-4)) return value.toExponential(1).replace("e+", "e");
  const digits = Math.max(0, Math.min(6, 1 - Math.floor(Math.log10(span))));
  return Number(value.toFixed(digits)).toLocaleString("en", { maximumFractionDigits: digits });
}

function brief(value) {
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}

function cut(text, most) { return text.length > most ? `${text.slice(0, Math.max(1, most - 1))}…` : text; }
