// The viewer of a field. Each channel is sent once, as the numbers of its file, and the masks as the
// numbers of objects; contrast, colours and outlines are computed from them by the GPU (WebGL2).

import { drawn, element, fill, shaders } from "./page.js";

const viewer = JSON.parse(document.getElementById("viewer").textContent);
const view = document.getElementById("view");
const canvas = view.querySelector("canvas");
const said = view.querySelector(".said");
const bar = view.querySelector(".bar");
const panel = document.getElementById("cell");
const aside = panel.parentElement;
let gl = null;
const KNEE = 0.4; // as in report/drawing.py: above it the light of several channels grows less and less
const GREATEST_ZOOM = 40;
const KINDS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

const size = { width: 0, height: 0 };
const channels = viewer.channels.map((of, at) => ({
  ...of, at, gamma: 1, usual: { on: of.on, colour: of.colour },
}));
const masks = {};
const state = { x: 0, y: 0, zoom: 0, outlines: { now: true, before: true }, cell: null };
let program = null;
let drawing = false;

// Numbers and colours

const hex = (colour) => "#" + colour.map((part) => Math.round(255 * part).toString(16).padStart(2, "0")).join("");
const fromHex = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16) / 255);
const OUTLINES = { now: fromHex("#ffc400"), before: fromHex("#56b4e9") };
const finite = (value) => Number.isFinite(value);
const short = (value) => (Math.abs(value) >= 100 || Number.isInteger(value) ? String(Math.round(value)) : value.toPrecision(3));

// Reading

async function read(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error((await answer.text()).trim().slice(0, 400));
  const [kind, height, width, type] = answer.headers.get("X-Pixels").split(" ");
  return { pixels: new KINDS[kind](await answer.arrayBuffer()), height: +height, width: +width, type };
}

async function readChannel(channel) {
  try {
    Object.assign(channel, await read(channel.address));
  } catch (error) {
    channel.problem = error.message || "This channel cannot be read.";
  }
}

async function readMask(name) {
  try {
    masks[name] = { ...viewer.masks[name], ...(await read(viewer.masks[name].address)) };
    if (masks[name].pixels instanceof Float32Array) delete masks[name];
  } catch (error) {
    say(`The masks cannot be shown. ${error.message}`);
  }
}

async function presets() {
  if (channels.every((channel) => channel.limits)) return;
  try {
    const found = await (await fetch(viewer.contrast)).json();
    for (const channel of channels) channel.limits ||= found[channel.name];
  } catch { /* each field then has its own contrast */ }
}

function sample(channel) {
  // Some hundred thousand of its pixels, in order of size: enough for levels and sliders.
  if (!channel.sample) {
    const { pixels } = channel, step = Math.max(1, Math.floor(pixels.length / 100000));
    channel.sample = new Float32Array(Math.ceil(pixels.length / step));
    for (let at = 0, to = 0; at < pixels.length; at += step, to += 1) channel.sample[to] = finite(pixels[at]) ? pixels[at] : 0;
    channel.sample.sort();
  }
  return channel.sample;
}

function extremes(channel) {
  const some = sample(channel), least = some[0], most = some[some.length - 1];
  return [Math.min(least, channel.limits[0]), Math.max(most, channel.limits[1], least + 1)];
}

function ownContrast(channel) {
  // The 1st and the 99.7th percentile, as of a thumbnail.
  const some = sample(channel), of = (share) => some[Math.round(share * (some.length - 1))];
  return [of(0.01), Math.max(of(0.997), of(0.01) + 1e-6)];
}

// Drawing

function sources(n) {
  const all = [...Array(n).keys()];
  return [`#version 300 es
in vec2 corner;
void main() { gl_Position = vec4(corner, 0.0, 1.0); }`, `#version 300 es
precision highp float;
precision highp int;
precision highp usampler2D;
uniform ivec2 size;
uniform vec2 origin, window;
uniform float scale, thick;
uniform int samples;
uniform usampler2D now, before;
uniform bvec2 outlined;
uniform vec3 nowColour, beforeColour;
uniform uint selected;
uniform bool selectedBefore, mixed;
${all.map((n) => `uniform usampler2D c${n}; uniform vec4 r${n}; uniform vec3 k${n};`).join("\n")}
out vec4 shown;

uint at(usampler2D from, vec2 p) { return texelFetch(from, clamp(ivec2(floor(p)), ivec2(0), size - 1), 0).r; }
float value(usampler2D from, ivec2 q, float isFloat) {
  uint raw = texelFetch(from, q, 0).r;
  float read = isFloat > 0.5 ? uintBitsToFloat(raw) : float(raw);
  return isnan(read) ? 0.0 : read;
}
const vec2 AROUND[8] = vec2[8](vec2(1, 0), vec2(-1, 0), vec2(0, 1), vec2(0, -1),
  vec2(0.7, 0.7), vec2(-0.7, 0.7), vec2(0.7, -0.7), vec2(-0.7, -0.7));
bool edge(usampler2D from, vec2 p, float d) {
  uint own = at(from, p);
  if (own == 0u) return false;
  for (int i = 0; i < 8; i++) if (at(from, p + d * AROUND[i]) != own) return true;
  return false;
}
bool rim(usampler2D from, vec2 p, float d) {
  bool own = at(from, p) == selected;
  for (int i = 0; i < 8; i++) if ((at(from, p + d * AROUND[i]) == selected) != own) return true;
  return false;
}
void main() {
  vec2 p = origin + vec2(gl_FragCoord.x, window.y - gl_FragCoord.y) * scale;
  if (p.x < 0.0 || p.y < 0.0 || p.x >= float(size.x) || p.y >= float(size.y)) { shown = vec4(0.09, 0.10, 0.12, 1.0); return; }
  vec3 light = vec3(0.0);
  ${all.map((n) => `float s${n} = 0.0;`).join(" ")}
  for (int i = 0; i < samples; i++) for (int j = 0; j < samples; j++) {
    vec2 off = (vec2(float(i), float(j)) + 0.5) / float(samples) - 0.5;
    ivec2 q = clamp(ivec2(floor(p + off * scale)), ivec2(0), size - 1);
    ${all.map((n) => `s${n} += value(c${n}, q, r${n}.w);`).join("\n    ")}
  }
  float share = 1.0 / float(samples * samples);
  ${all.map((n) => `light += pow(clamp((s${n} * share - r${n}.x) * r${n}.y, 0.0, 1.0), r${n}.z) * k${n};`).join("\n  ")}
  float most = max(light.r, max(light.g, light.b));
  if (mixed && most > ${KNEE}) light *= (${KNEE} + ${1 - KNEE} * (1.0 - exp((${KNEE} - most) / ${1 - KNEE}))) / most;
  light = clamp(light, 0.0, 1.0);
  if (outlined.y && edge(before, p, thick)) light = beforeColour;
  if (outlined.x && edge(now, p, thick)) light = nowColour;
  if (selected != 0u) {
    bool on = selectedBefore ? rim(before, p, thick * 1.6) : rim(now, p, thick * 1.6);
    if (on) light = vec3(1.0);
  }
  shown = vec4(light, 1.0);
}`];
}

function compile(n) {
  const made = shaders(gl, ...sources(n));
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 3, -1, -1, 3]), gl.STATIC_DRAW);
  const corner = gl.getAttribLocation(made.program, "corner");
  gl.enableVertexAttribArray(corner);
  gl.vertexAttribPointer(corner, 2, gl.FLOAT, false, 0, 0);
  return { ...made, n };
}

const uniform = (name) => program.uniform(name);

function texture(of) {
  // A float travels as the bits that it is made of, so that one kind of texture holds all.
  const bits = of.pixels instanceof Float32Array ? new Uint32Array(of.pixels.buffer) : of.pixels;
  const [inside, type] = { Uint8Array: [gl.R8UI, gl.UNSIGNED_BYTE], Uint16Array: [gl.R16UI, gl.UNSIGNED_SHORT],
    Uint32Array: [gl.R32UI, gl.UNSIGNED_INT] }[bits.constructor.name];
  of.texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, of.texture);
  gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
  gl.texImage2D(gl.TEXTURE_2D, 0, inside, of.width, of.height, 0, gl.RED_INTEGER, type, bits);
  for (const name of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, name, gl.NEAREST);
  for (const name of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, name, gl.CLAMP_TO_EDGE);
}

function bind(unit, name, of) {
  gl.activeTexture(gl.TEXTURE0 + unit);
  gl.bindTexture(gl.TEXTURE_2D, of);
  gl.uniform1i(uniform(name), unit);
}

const ratio = () => Math.min(3, window.devicePixelRatio || 1);

function draw() {
  drawing = false;
  const on = channels.filter((channel) => channel.on && channel.texture);
  if (!program || program.n !== on.length) program = compile(on.length);
  const pixels = ratio(), scale = 1 / (state.zoom * pixels);
  gl.viewport(0, 0, canvas.width, canvas.height);
  gl.uniform2i(uniform("size"), size.width, size.height);
  gl.uniform2f(uniform("window"), canvas.width, canvas.height);
  gl.uniform2f(uniform("origin"), state.x - (canvas.width * scale) / 2, state.y - (canvas.height * scale) / 2);
  gl.uniform1f(uniform("scale"), scale);
  gl.uniform1f(uniform("thick"), pixels * scale);
  gl.uniform1i(uniform("samples"), Math.max(1, Math.min(4, Math.ceil(scale - 0.01))));
  on.forEach((channel, unit) => {
    bind(unit, `c${unit}`, channel.texture);
    const wide = Math.max(1e-9, channel.high - channel.low);
    gl.uniform4f(uniform(`r${unit}`), channel.low, 1 / wide, 1 / channel.gamma, channel.pixels instanceof Float32Array ? 1 : 0);
    gl.uniform3f(uniform(`k${unit}`), ...channel.colour);
  });
  bind(on.length, "now", (masks.now || masks.empty).texture);
  bind(on.length + 1, "before", (masks.before || masks.empty).texture);
  gl.uniform2i(uniform("outlined"), masks.now && state.outlines.now ? 1 : 0, masks.before && state.outlines.before ? 1 : 0);
  gl.uniform3f(uniform("nowColour"), ...OUTLINES.now);
  gl.uniform3f(uniform("beforeColour"), ...OUTLINES.before);
  const in_ = state.cell && ["now", "before"].find((name) => masks[name]?.id === state.cell.segmentation);
  gl.uniform1ui(uniform("selected"), in_ ? state.cell.number : 0);
  gl.uniform1i(uniform("mixed"), on.length > 1 ? 1 : 0);
  gl.uniform1i(uniform("selectedBefore"), in_ === "before" ? 1 : 0);
  gl.drawArrays(gl.TRIANGLES, 0, 3);
  drawBar();
  document.getElementById("zoom").textContent = `${Math.round(100 * state.zoom)} %`;
}

function redraw() {
  if (!size.width) return;
  if (!drawing) requestAnimationFrame(draw);
  drawing = true;
  remember();
}

function scaleBar(widest) {
  // The longest of 1, 2 and 5 times a power of ten that fits.
  const unit = viewer.pixel_size || 1;
  const room = (widest / state.zoom) * unit, power = 10 ** Math.floor(Math.log10(room));
  const length = [5, 2, 1].map((n) => n * power).find((n) => n <= room) || power;
  const named = viewer.pixel_size ? `${+length.toPrecision(3)} µm` : `${+length.toPrecision(3)} pixel${length === 1 ? "" : "s"}`;
  return { width: (length / unit) * state.zoom, text: named };
}

function drawBar() {
  const found = scaleBar(canvas.clientWidth / 5);
  bar.firstElementChild.style.width = `${found.width}px`;
  bar.lastElementChild.textContent = found.text;
  bar.hidden = false;
}

// Moving

const smallest = () => Math.min(0.5, least() / 2);
const least = () => Math.min(canvas.clientWidth / size.width, canvas.clientHeight / size.height);

function fit() {
  Object.assign(state, { x: size.width / 2, y: size.height / 2, zoom: least() });
  state.fitted = true;
  redraw();
}

function zoomTo(zoom, px = canvas.clientWidth / 2, py = canvas.clientHeight / 2) {
  const [x, y] = place(px, py);
  state.zoom = Math.min(GREATEST_ZOOM, Math.max(smallest(), zoom));
  state.x = x - (px - canvas.clientWidth / 2) / state.zoom;
  state.y = y - (py - canvas.clientHeight / 2) / state.zoom;
  move(0, 0);
}

function within(at, length, shown) {
  // What is smaller than the window stands in its middle, what is larger fills it.
  return shown >= length ? length / 2 : Math.min(length - shown / 2, Math.max(shown / 2, at));
}

function move(x, y) {
  state.x = within(state.x + x, size.width, canvas.clientWidth / state.zoom);
  state.y = within(state.y + y, size.height, canvas.clientHeight / state.zoom);
  state.fitted = false;
  redraw();
}

const place = (px, py) => [state.x + (px - canvas.clientWidth / 2) / state.zoom, state.y + (py - canvas.clientHeight / 2) / state.zoom];

function resized() {
  const pixels = ratio();
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * pixels));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * pixels));
  if (state.fitted) fit();
  else redraw();
}

const pointers = new Map();
let moved = 0, spread = 0;

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
  if (pointers.size === 1) moved = 0;
});
canvas.addEventListener("pointermove", (event) => {
  readout(event.offsetX, event.offsetY);
  const before = pointers.get(event.pointerId);
  if (!before) return;
  pointers.set(event.pointerId, event);
  const [dx, dy] = [event.offsetX - before.offsetX, event.offsetY - before.offsetY];
  moved += Math.abs(dx) + Math.abs(dy);
  if (pointers.size === 2) {
    const [a, b] = [...pointers.values()];
    const now = Math.hypot(a.offsetX - b.offsetX, a.offsetY - b.offsetY);
    if (spread) zoomTo((state.zoom * now) / spread, (a.offsetX + b.offsetX) / 2, (a.offsetY + b.offsetY) / 2);
    spread = now;
  } else if (moved > 4) move(-dx / state.zoom, -dy / state.zoom);
});
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, (event) => {
    if (name === "pointerup" && pointers.size === 1 && moved <= 4) pick(...place(event.offsetX, event.offsetY));
    pointers.delete(event.pointerId);
    spread = 0;
  });
}
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomTo(state.zoom * Math.exp(-Math.sign(event.deltaY) * Math.min(0.4, Math.abs(event.deltaY) / 400)), event.offsetX, event.offsetY);
}, { passive: false });
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = 60 / state.zoom;
  const keys = { ArrowLeft: () => move(-step, 0), ArrowRight: () => move(step, 0), ArrowUp: () => move(0, -step),
    ArrowDown: () => move(0, step), "+": () => zoomTo(state.zoom * 1.25), "=": () => zoomTo(state.zoom * 1.25),
    "-": () => zoomTo(state.zoom / 1.25), 0: fit, Enter: () => pick(state.x, state.y), o: toggleOutlines };
  const done = keys[event.key];
  if (done) {
    event.preventDefault();
    done();
  }
});

function readout(px, py) {
  const [x, y] = place(px, py).map(Math.floor);
  const inside = x >= 0 && y >= 0 && x < size.width && y < size.height;
  const values = channels.filter((channel) => channel.texture && channel.on)
    .map((channel) => `${channel.name} ${short(channel.pixels[y * size.width + x])}`);
  document.getElementById("readout").textContent = inside ? `row ${y}, column ${x}: ${values.join(", ")}` : "\u00a0";
}

// Cells

const numberAt = (mask, x, y) => (mask && x >= 0 && y >= 0 && x < size.width && y < size.height
  ? mask.pixels[Math.floor(y) * size.width + Math.floor(x)] : 0);

function pick(x, y) {
  for (const name of ["now", "before"]) {
    const number = state.outlines[name] || name === "now" ? numberAt(masks[name], x, y) : 0;
    if (number) {
      show(`segmentation=${masks[name].id}&object=${number}`);
      return;
    }
  }
  state.cell = null;
  panel.innerHTML = '<p class="soft">Click a cell to see what is known of it.</p>';
  select([]);
  redraw();
}

let asked = 0;

async function show(query) {
  const mine = ++asked, run = given.get("run");
  const address = `/field/${viewer.image}/cell?${query}${run ? `&run=${encodeURIComponent(run)}` : ""}`;
  if (!(await fill(panel, address, () => mine === asked))) return;
  const of = panel.firstElementChild.dataset;
  state.cell = { id: +of.cell, number: +of.number, segmentation: +of.segmentation };
  reveal();
  select([state.cell.id]);
  redraw();
}

const reveal = () => { // only where the settings scroll by themselves
  aside.scrollTop += panel.getBoundingClientRect().top - aside.getBoundingClientRect().top;
};
const select = (ids) => document.dispatchEvent(new CustomEvent("cellstore:selection", { detail: { level: "cell", ids } }));

document.addEventListener("cellstore:annotated", () => {
  if (state.cell) show(`cell=${state.cell.id}`);
});

function toggleOutlines() {
  const on = !(state.outlines.now || state.outlines.before);
  state.outlines = { now: on, before: on };
  showOutlines();
  redraw();
}

function showOutlines() {
  for (const row of document.querySelectorAll(".outline")) row.querySelector("input").checked = state.outlines[row.dataset.mask];
}

// Settings

const STEPS = 1000;
const toStep = (channel, value) => {
  const [low, high] = extremes(channel);
  return Math.round(STEPS * Math.cbrt(Math.min(1, Math.max(0, (value - low) / (high - low)))));
};
const fromStep = (channel, step) => {
  const [low, high] = extremes(channel);
  const value = low + (high - low) * (step / STEPS) ** 3;
  return channel.pixels instanceof Float32Array ? +value.toPrecision(4) : Math.round(value);
};

function controls(channel) {
  const named = (what) => `${what} of ${channel.name}`;
  const on = element("input", { type: "checkbox", checked: channel.on });
  const colour = element("input", { type: "color", "aria-label": named("Colour") });
  const number = (what) => element("input", { type: "number", step: "any", "aria-label": named(what) });
  const slider = (what) => element("input", { type: "range", min: 0, max: STEPS, "aria-label": `${named(what)}, slider` });
  const low = number("Black level"), high = number("White level");
  const lowSlider = slider("Black level"), highSlider = slider("White level");
  const gamma = element("input", { type: "number", min: 0.2, max: 3, step: 0.05, "aria-label": named("Gamma") });
  const head = element("div", { className: "row" }, element("label", {}, on, " ", element("b", { textContent: channel.name })));
  const made = element("div", { className: "channel" }, head);
  if (channel.problem) {
    on.checked = channel.on = false;
    on.disabled = true;
    made.append(element("p", { className: "soft", textContent: channel.problem }));
    return made;
  }
  if (channel.type !== "uint16") head.append(element("span", { className: "soft", textContent: channel.type }));
  head.append(element("label", { className: "gamma soft", title: "1: as bright as the grey level; above 1, dim parts are brighter" }, "gamma ", gamma), colour);
  made.append(element("div", { className: "levels" }, low, lowSlider, highSlider, high));
  channel.refresh = () => {
    on.checked = channel.on;
    made.classList.toggle("off", !channel.on);
    colour.value = hex(channel.colour);
    if (document.activeElement !== low) low.value = short(channel.low);
    if (document.activeElement !== high) high.value = short(channel.high);
    lowSlider.value = toStep(channel, channel.low);
    highSlider.value = toStep(channel, channel.high);
    if (document.activeElement !== gamma) gamma.value = +channel.gamma.toFixed(2);
  };
  const change = (input, take) => input.addEventListener("input", () => {
    take();
    channel.refresh();
    redraw();
  });
  change(on, () => { channel.on = on.checked; });
  change(colour, () => { channel.colour = fromHex(colour.value); });
  change(low, () => { if (finite(low.valueAsNumber)) channel.low = low.valueAsNumber; });
  change(high, () => { if (finite(high.valueAsNumber)) channel.high = high.valueAsNumber; });
  change(lowSlider, () => { channel.low = Math.min(fromStep(channel, +lowSlider.value), channel.high); });
  change(highSlider, () => { channel.high = Math.max(fromStep(channel, +highSlider.value), channel.low); });
  change(gamma, () => { if (gamma.value >= 0.2 && gamma.value <= 3) channel.gamma = +gamma.value; });
  channel.refresh();
  return made;
}

function levels(which) {
  for (const channel of channels) {
    if (!channel.texture) continue;
    [channel.low, channel.high] = which === "plate" ? channel.limits : ownContrast(channel);
    channel.refresh?.();
  }
  redraw();
}

function reset() {
  for (const channel of channels) Object.assign(channel, channel.usual, { gamma: 1 });
  levels("plate");
}

for (const row of document.querySelectorAll(".outline")) {
  row.addEventListener("input", ({ target }) => { state.outlines[row.dataset.mask] = target.checked; redraw(); });
}

document.addEventListener("click", (event) => {
  const what = event.target.closest(".viewer [data-do]")?.dataset.do;
  const actions = { in: () => zoomTo(state.zoom * 1.25), out: () => zoomTo(state.zoom / 1.25), fit, one: () => zoomTo(1),
    png: savePng, svg: saveSvg, plate: () => levels("plate"), auto: () => levels("auto"), reset };
  if (what && size.width) actions[what]();
});

// The address: it brings the same view back

const given = new URLSearchParams(location.search);
let remembering = 0;

function remember() {
  clearTimeout(remembering);
  remembering = setTimeout(write, 250);
}

function settings() {
  const found = new URLSearchParams();
  if (given.get("run")) found.set("run", given.get("run"));
  for (const channel of channels) {
    if (!channel.texture) continue;
    const parts = [+channel.on, hex(channel.colour).slice(1), short(channel.low), short(channel.high), +channel.gamma.toFixed(2)];
    const usual = [+channel.usual.on, hex(channel.usual.colour).slice(1), ...channel.limits.map(short), 1];
    if (parts.join() !== usual.join()) found.set(`c${channel.at}`, parts.join());
  }
  const there = Object.keys(viewer.masks), on = there.filter((name) => state.outlines[name]);
  if (on.length < there.length) found.set("outlines", on[0] || "none");
  return found;
}

function write() {
  const found = settings();
  for (const link of document.querySelectorAll("a.stay")) [link.search, link.hash] = [found.toString(), location.hash];
  for (const name of ["segmentation", "before"]) if (given.get(name)) found.set(name, given.get(name));
  if (state.cell) found.set("cell", state.cell.id);
  if (!state.fitted || state.cell) { // a cell alone would be brought to the middle
    found.set("x", state.x.toFixed(1));
    found.set("y", state.y.toFixed(1));
    found.set("z", +state.zoom.toFixed(3));
  }
  const query = found.toString();
  history.replaceState(history.state, "", location.pathname + (query ? `?${query}` : "") + location.hash);
}

document.querySelector("form.compare")?.addEventListener("formdata", (event) => {
  for (const [name, value] of settings()) event.formData.append(name, value);
});

function recall() {
  for (const channel of channels) {
    const parts = (given.get(`c${channel.at}`) || "").split(",");
    if (parts.length !== 5 || !/^[0-9a-f]{6}$/i.test(parts[1])) continue;
    const [low, high, gamma] = parts.slice(2).map(Number);
    if (![low, high, gamma].every(finite)) continue;
    Object.assign(channel, { on: parts[0] === "1", colour: fromHex(`#${parts[1]}`), low, high, gamma: Math.min(3, Math.max(0.2, gamma)) });
  }
  const outlines = given.get("outlines");
  if (outlines) state.outlines = { now: outlines === "now", before: outlines === "before" };
  showOutlines();
  const [x, y, zoom] = ["x", "y", "z"].map((name) => (given.get(name) ? Number(given.get(name)) : NaN));
  if ([x, y, zoom].every(finite) && zoom > 0) {
    Object.assign(state, { x, y, zoom: Math.min(GREATEST_ZOOM, Math.max(smallest(), zoom)), fitted: false });
    move(0, 0);
  } else fit();
  const cell = viewer.cell;
  if (!cell) return;
  state.cell = cell;
  if (!given.has("z") && cell.row !== null && cell.column !== null) {
    Object.assign(state, { x: cell.column, y: cell.row, zoom: Math.max(state.zoom, Math.min(3, 4 * least())) });
    move(0, 0);
  }
}

// Saving: the picture with its scale bar and its names

function download(blob, ending) {
  const link = element("a", { href: URL.createObjectURL(blob), download: `${viewer.name.replace(/[^\w.-]+/g, "_")}.${ending}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function caption() {
  const shown = channels.filter((channel) => channel.on && channel.texture);
  const outlined = Object.keys(viewer.masks).filter((name) => masks[name] && state.outlines[name]);
  return [
    { text: viewer.caption, colour: "#fff" },
    ...shown.map((channel) => ({ text: `${channel.name} ${short(channel.low)} to ${short(channel.high)}`
      + (channel.gamma === 1 ? "" : `, gamma ${channel.gamma.toFixed(2)}`), colour: hex(channel.colour) })),
    ...outlined.map((name) => ({ text: `outlines of segmentation ${masks[name].id}`, colour: hex(OUTLINES[name]) })),
  ];
}

const LINE = 20, EDGE = 12;

function savePng() {
  draw();
  const pixels = ratio(), lines = caption();
  const out = element("canvas", { width: canvas.width, height: canvas.height + Math.round(pixels * (EDGE + LINE * lines.length)) });
  const pen = out.getContext("2d");
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, out.width, out.height);
  pen.drawImage(canvas, 0, 0);
  pen.scale(pixels, pixels);
  const [width, height] = [canvas.width / pixels, canvas.height / pixels], found = scaleBar(width / 5);
  pen.font = "14px sans-serif";
  pen.fillStyle = "#fff";
  pen.shadowColor = "#000";
  pen.shadowBlur = 3;
  pen.fillRect(EDGE, height - EDGE - 4, found.width, 4);
  pen.fillText(found.text, EDGE, height - EDGE - 10);
  pen.shadowBlur = 0;
  lines.forEach((line, at) => {
    pen.fillStyle = line.colour;
    pen.fillText(line.text, EDGE, height + LINE * (1 + at));
  });
  out.toBlob((blob) => download(blob, "png"));
}

function saveSvg() {
  draw();
  const pixels = ratio(), lines = caption(), [width, height] = [canvas.width / pixels, canvas.height / pixels];
  const whole = height + EDGE + LINE * lines.length, found = scaleBar(width / 5);
  const svg = drawn("svg", { width, height: whole, viewBox: `0 0 ${width} ${whole}`, "font-family": "sans-serif", "font-size": 14 },
    drawn("title", {}, viewer.caption),
    drawn("rect", { width, height: whole, fill: "#000" }),
    drawn("image", { width, height, href: canvas.toDataURL("image/png") }),
    drawn("rect", { x: EDGE, y: height - EDGE - 4, width: found.width, height: 4, fill: "#fff" }),
    drawn("text", { x: EDGE, y: height - EDGE - 10, fill: "#fff" }, found.text),
    ...lines.map((line, at) => drawn("text", { x: EDGE, y: height + LINE * (1 + at), fill: line.colour }, line.text)));
  download(new Blob([new XMLSerializer().serializeToString(svg)], { type: "image/svg+xml" }), "svg");
}

// The beginning

function say(words) {
  said.textContent = words;
  said.hidden = !words;
}

function plainPicture(words) {
  // Without the GPU, or where it cannot hold the field: a picture as the server draws it.
  canvas.hidden = true;
  view.append(element("img", { src: `/field/${viewer.image}/thumbnail?width=1080&outlines=1`, alt: `${viewer.name} with the outlines of its cells` }));
  view.removeAttribute("aria-busy");
  for (const part of document.querySelectorAll(".settings :is(input, [data-do]), .tools button")) part.disabled = true;
  say(words);
}

async function begin() {
  const reading = Promise.all([presets(), ...channels.map(readChannel), ...Object.keys(viewer.masks).map(readMask)]);
  if (viewer.cell) show(`cell=${viewer.cell.id}`);
  // After the reading has begun: to make one takes time.
  gl = canvas.getContext("webgl2", { alpha: false, antialias: false, preserveDrawingBuffer: true });
  if (!gl) {
    plainPicture("This browser has no WebGL2, so this is a picture without sliders. Another browser, or its setting for graphics acceleration, brings them.");
    return;
  }
  await reading;
  const first = channels.find((channel) => channel.pixels);
  const holder = document.getElementById("channels");
  if (!first) {
    holder.append(...channels.map(controls));
    say(channels[0]?.problem || "This image has no channels. Ingest its files first.");
    canvas.hidden = true;
    return;
  }
  const most = gl.getParameter(gl.MAX_TEXTURE_SIZE);
  if (Math.max(first.width, first.height) > most) {
    plainPicture(`This field is larger than the ${most} pixels that this GPU can hold, so this is a smaller picture of it.`);
    return;
  }
  Object.assign(size, { width: first.width, height: first.height });
  const room = gl.getParameter(gl.MAX_TEXTURE_IMAGE_UNITS) - 2;
  for (const channel of channels) {
    if (channel.pixels && (channel.width !== size.width || channel.height !== size.height)) {
      channel.problem = `It has ${channel.width} x ${channel.height} pixels, the first one ${size.width} x ${size.height}.`;
    }
    if (channel.at >= room) channel.problem = `This GPU shows ${room} channels at once.`;
    if (!channel.pixels || channel.problem) continue;
    texture(channel);
    channel.limits ||= ownContrast(channel);
    [channel.low, channel.high] = channel.limits;
  }
  for (const name of Object.keys(masks)) {
    if (masks[name].width !== size.width || masks[name].height !== size.height) {
      say("The masks are of another size than the image, so there are no outlines. Segment it again.");
      delete masks[name];
    } else texture(masks[name]);
  }
  masks.empty = { pixels: new Uint8Array(1), width: 1, height: 1 };
  texture(masks.empty);
  if (said.textContent.startsWith("Reading")) say("");
  new ResizeObserver(resized).observe(canvas);
  canvas.width = canvas.clientWidth;
  recall();
  holder.append(...channels.map(controls));
  if (state.cell) reveal();
  resized();
  draw();
  view.removeAttribute("aria-busy");
  performance.mark("cellstore:shown");
}

canvas.addEventListener("webglcontextlost", (event) => {
  event.preventDefault();
  say("The browser has taken the graphics memory away. Load the page again.");
});

begin().catch((error) => say(`The viewer has failed: ${error.message}`));
