// Who fired: what is kept of an answer's spikes, and the view of it.
//
// The neurons in front of a matrix are one population. The first token of an answer comes from the
// prompt, so the steps begin with the second.

import { $, count, element, percent, tokens } from "./base.js";

const KEPT = 500; // steps whose shares are kept
const WIDTHS = [25, 50, 100, 200]; // steps that the map shows: as few as hold the answer
const OPEN_LAYERS = 8; // more are listed closed
const FIRST_TOKEN = 2;

// ---------------------------------------------------------------- the numbers of one answer

export class Spikes {
  constructor() {
    this.steps = 0;
    this.populations = []; // {name, size, fired, bits}: fired in all steps, the bits of the latest
    this.shares = []; // of the latest steps: per population, 255 where all fired
    this.silent = null; // of the latest step
    this.bytes = null;
    this.allSilent = 0; // summed over the steps
    this.allBytes = 0;
  }

  static from({ shares, ...fields }) {
    const found = Object.assign(new Spikes(), fields);
    const bytes = decode(shares);
    const width = found.populations.length;
    for (let at = 0; at < bytes.length; at += width) {
      found.shares.push(bytes.subarray(at, at + width));
    }
    return found;
  }

  // As it is stored: without the bits.
  record(withShares) {
    const { steps, silent, bytes, allSilent, allBytes } = this;
    const populations = this.populations.map(({ name, size, fired }) => ({ name, size, fired }));
    const shares = encode(withShares ? this.shares : []);
    return { steps, silent, bytes, allSilent, allBytes, populations, shares };
  }

  // A step as the server tells it.
  add({ silent_fraction, weight_bytes, fired }) {
    this.steps += 1;
    this.silent = silent_fraction;
    this.bytes = weight_bytes;
    this.allSilent += silent_fraction ?? 0;
    this.allBytes += weight_bytes ?? 0;
    const row = fired.map(({ neurons, size, bits }, i) => {
      const population = (this.populations[i] ??= { name: neurons, size, fired: 0 });
      population.bits = decode(bits);
      const number = ones(population.bits);
      population.fired += number;
      return Math.round((number / size) * 255);
    });
    this.shares.push(Uint8Array.from(row));
    if (this.shares.length > KEPT) this.shares.shift();
  }

  // Of some populations, in the whole answer.
  silence(populations) {
    const sum = (field) => populations.reduce((all, population) => all + population[field], 0);
    return 1 - sum("fired") / (this.steps * sum("size"));
  }

  // The populations by layer, in the order in which they fire.
  get layers() {
    const found = new Map();
    this.populations.forEach((population, index) => {
      const [, number, rest] = population.name.match(/^layers\.(\d+)\.(.+)$/) ?? [];
      const layer = number ?? population.name;
      const none = { label: layer, title: title(number, layer), parts: [] };
      if (!found.has(layer)) found.set(layer, none);
      found.get(layer).parts.push({ population, index, label: rest ?? "input" });
    });
    return [...found.values()];
  }
}

const title = (number, name) =>
  number === undefined ? name[0].toUpperCase() + name.slice(1) : `Layer ${number}`;

const decode = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const encode = (rows) => btoa(rows.map((row) => String.fromCharCode(...row)).join(""));

function ones(bytes) {
  let found = 0;
  for (let byte of bytes) for (; byte; byte &= byte - 1) found += 1;
  return found;
}

const isOne = (bits, at) => (bits[at >> 3] >> (at & 7)) & 1;

// ---------------------------------------------------------------- the view

let shown = null; // the turn whose spikes are shown
let runs = false; // whether its answer is still coming
let frame = 0;
let drawn = ""; // the names of the populations that there are rows for
let rows = []; // per layer: {details, silent, views: [{canvas, silent}]}
let cell = null; // what is pointed at in the map: {row, step}

export function showSpikes(turn, isRunning) {
  if (turn !== shown) cell = null;
  shown = turn;
  runs = isRunning;
  redraw();
}

// At most once for each frame of the screen, however fast the tokens come.
export function redraw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    // Otherwise its panel is closed.
    if (shown && $("spikes").offsetWidth) draw();
  });
}

function draw() {
  const { spikes, result } = shown;
  const isOn = $("show-spikes").checked;
  showNumbers(spikes, result?.spikes);
  $("spikes-note").textContent = note(shown, isOn);
  const isThere = isOn && spikes?.steps > 0;
  $("fired").hidden = !isThere || !spikes.shares.length;
  $("populations").hidden = !isThere;
  if (!isThere) return;
  const layers = spikes.layers;
  const names = spikes.populations.map(({ name }) => name).join();
  if (names !== drawn) build(layers);
  drawn = names;
  if (spikes.shares.length) drawMap(spikes, layers);
  drawRows(spikes, layers);
}

function note({ parent, spikes, result }, isOn) {
  if (!isOn) return "";
  if (!parent) return "The next answer shows here who fires.";
  if (spikes?.shares.length || runs) return "";
  if (spikes?.steps) return "Who fired at which token was too much to keep.";
  if (!spikes) return "This answer came while spikes were not shown.";
  const isTooShort = result?.usage.completion_tokens < FIRST_TOKEN;
  if (isTooShort) return "The first token comes from the prompt: nothing to show.";
  return "This model does not tell who fired.";
}

// Of the latest step, and of the answer: as the server sums it up at the end.
function showNumbers(spikes, summary) {
  const { steps, silent = null, bytes = null, allSilent, allBytes } = spikes ?? {};
  const silentAll = summary?.silent_fraction ?? (silent === null ? null : allSilent / steps);
  const readAll = summary?.weight_bytes_per_token ?? (bytes === null ? null : allBytes / steps);
  $("silent-last").textContent = silent === null ? "–" : percent(silent);
  $("silent-all").textContent = silentAll === null ? "–" : percent(silentAll);
  $("read-last").textContent = bytes === null ? "–" : size(bytes);
  $("read-all").textContent = readAll === null ? "–" : size(readAll);
}

const UNITS = ["byte", "kilobyte", "megabyte", "gigabyte"];

function size(bytes) {
  const power = Math.min(Math.floor(Math.log10(bytes || 1) / 3), UNITS.length - 1);
  const options = { style: "unit", unit: UNITS[power], maximumSignificantDigits: 3 };
  return (bytes / 1000 ** power).toLocaleString("en", options);
}

// ---------------------------------------------------------------- the rows: one per population

function build(layers) {
  const span = (className, textContent = "") => element("span", { className, textContent });
  rows = layers.map(({ title, parts }) => {
    const silent = span("share");
    const details = element("details", { open: layers.length <= OPEN_LAYERS, ontoggle: redraw });
    details.append(element("summary", {}, span("", title), silent));
    const views = parts.map(({ label }) => {
      const canvas = element("canvas", { role: "img", height: 1 });
      const view = { canvas, silent: span("share") };
      details.append(
        element("div", { className: "population" }, span("name", label), canvas, view.silent),
      );
      return view;
    });
    return { details, silent, views };
  });
  $("layers").replaceChildren(...rows.map(({ details }) => details));
  const labels = layers.map(({ label, parts }) => {
    const made = span("", label);
    made.style.setProperty("--rows", parts.length);
    return made;
  });
  $("map-layers").replaceChildren(...labels);
}

function drawRows(spikes, layers) {
  const hasBits = spikes.populations.some(({ bits }) => bits);
  $("rows-title").textContent = hasBits ? "Last token's neurons" : "";
  const first = rows.find(({ details }) => details.open)?.views[0].canvas;
  // Read before anything is written, so that the page is laid out once.
  const pixels = Math.max(1, Math.round((first?.clientWidth ?? 0) * devicePixelRatio));
  const colour = colourOf(first ?? $("map"));
  rows.forEach(({ details, silent, views }, i) => {
    const { parts } = layers[i];
    silent.textContent = percent(spikes.silence(parts.map(({ population }) => population)));
    views.forEach((view, j) => {
      const { population } = parts[j];
      const fraction = percent(spikes.silence([population]));
      view.silent.textContent = fraction;
      // Not `hidden`: it keeps its width, which is measured.
      view.canvas.style.visibility = population.bits ? "visible" : "hidden";
      if (!population.bits || !details.open) return;
      const fired = ones(population.bits);
      view.canvas.ariaLabel =
        `${population.name}: ${count(fired)} of ${count(population.size)} neurons fired at the ` +
        `last token; ${fraction} silent in this answer`;
      drawStrip(view.canvas, population, pixels, colour);
    });
  });
}

// A column per neuron; where they are more than the pixels, per group of equally many.
function drawStrip(canvas, { size, bits }, pixels, colour) {
  const group = Math.ceil(size / pixels);
  const shares = [];
  for (let start = 0; start < size; start += group) {
    const end = Math.min(start + group, size);
    let fired = 0;
    for (let at = start; at < end; at++) fired += isOne(bits, at);
    shares.push(fired / (end - start));
  }
  paint(canvas, shares.length, 1, (x) => shares[x], colour);
}

// ---------------------------------------------------------------- the map: populations by tokens

// Where its lines are: a population's number, or null between two layers.
const linesOf = (layers) =>
  layers.flatMap(({ parts }, i) => [...(i ? [null] : []), ...parts.map(({ index }) => index)]);

// The steps that it shows: the first, and how many there is room for.
function windowOf({ steps, shares }) {
  const width = WIDTHS.find((each) => each >= shares.length) ?? WIDTHS.at(-1);
  return { width, start: steps - Math.min(shares.length, width) };
}

const shareAt = ({ steps, shares }, step, row) => shares[step - steps + shares.length]?.[row];

function drawMap(spikes, layers) {
  const { width, start } = windowOf(spikes);
  const lines = linesOf(layers);
  const map = $("map");
  $("fired").style.setProperty("--lines", lines.length);
  const share = (x, y) => (shareAt(spikes, start + x, lines[y]) ?? 0) / 255;
  const mark = cell && { x: cell.step - start, y: lines.indexOf(cell.row) };
  paint(map, width, lines.length, share, colourOf(map), mark);
  $("map-from").textContent = `Token ${count(start + FIRST_TOKEN)}`;
  $("map-to").textContent = count(start + width - 1 + FIRST_TOKEN);
  const latest = spikes.shares.at(-1);
  const mean = ({ parts }) =>
    parts.reduce((sum, { index }) => sum + latest[index] / 255, 0) / parts.length;
  const numbers = layers.map((layer) => `${layer.title} ${percent(mean(layer))}`).join(", ");
  map.ariaLabel =
    `Share of neurons that fired: ${count(lines.filter((row) => row !== null).length)} ` +
    `populations, ${tokens(Math.min(spikes.shares.length, width))}. Last token: ${numbers}`;
  $("map-cell").textContent = cell
    ? describe(spikes)
    : "Stronger: more of them fired. Point, or use the arrow keys, for numbers.";
}

function describe(spikes) {
  const share = shareAt(spikes, cell.step, cell.row);
  const { name } = spikes.populations[cell.row];
  const fired = share === undefined ? "no step" : `${Math.round(share / 2.55)} % fired`;
  return `${name}, token ${count(cell.step + FIRST_TOKEN)}: ${fired}`;
}

function point(event) {
  const { spikes } = shown;
  const { width, start } = windowOf(spikes);
  const lines = linesOf(spikes.layers);
  const box = event.target.getBoundingClientRect();
  const row = lines[Math.floor(((event.clientY - box.top) / box.height) * lines.length)];
  const step = start + Math.floor(((event.clientX - box.left) / box.width) * width);
  cell = (row ?? null) !== null && step < spikes.steps ? { row, step } : null;
  redraw();
}

function move(event) {
  const { spikes } = shown;
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const [down, right] = steps[event.key];
  const { start } = windowOf(spikes);
  const { row, step } = cell ?? { row: 0, step: spikes.steps - 1 };
  const within = (value, least, most) => Math.min(Math.max(value, least), most);
  // The first key shows where one is.
  cell = {
    row: within(row + (cell ? down : 0), 0, spikes.populations.length - 1),
    step: within(step + (cell ? right : 0), start, spikes.steps - 1),
  };
  redraw();
}

function leaveMap() {
  cell = null;
  redraw();
}

// ---------------------------------------------------------------- pixels

// Canvases take their colour from the style sheet, as numbers.
const colourOf = (node) => getComputedStyle(node).color.match(/[\d.]+/g).slice(0, 3).map(Number);

// One pixel for each share; the style sheet stretches them. Few neurons fire in most places, so
// that shares are drawn by their root: 4 % is seen.
function paint(canvas, width, height, share, [red, green, blue], mark = null) {
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const image = new ImageData(width, height);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      image.data[at++] = red;
      image.data[at++] = green;
      image.data[at++] = blue;
      image.data[at++] = 255 * Math.sqrt(share(x, y));
    }
  }
  const context = canvas.getContext("2d");
  context.putImageData(image, 0, 0);
  if (!mark) return;
  context.fillStyle = getComputedStyle(document.body).color;
  context.fillRect(mark.x, mark.y, 1, 1);
}

$("map").addEventListener("pointermove", point);
$("map").addEventListener("pointerleave", leaveMap);
$("map").addEventListener("keydown", move);
$("map").addEventListener("blur", leaveMap);
$("show-spikes").addEventListener("change", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
// Also when its panel is opened.
new ResizeObserver(redraw).observe($("spikes"));
