// The panel: speed, memory, the expert store, and which experts of which layers are at work.
//
// GET /experts counts, for each layer and expert, the tokens routed there since the load. The map
// shows what was added lately, or all of it. A server that does not count says so by naming no layer.

import { button, element } from "./dom.js";
import { ApiError, get } from "./stream.js";
import { number, say } from "./strings.js";

/** Figures of the expert store. */
const STORE = ["hits", "waiting", "read"];
const PERIOD = 1000;
/** How much of a cell's brightness is left after a period. */
const KEPT = 0.7;
const ROW = 8;
const GAP = 5;
const MARGIN = 22;
const STEPS = 24;

export class Panel {
  #root;
  #toggle;
  #canvas = element("canvas", { tabIndex: 0, className: "heat" });
  #here = element("p", { className: "here" });
  #map = element("div");
  #figures = new Map();
  #inMemory = element("p", { className: "hint", textContent: say("inMemory") });
  #before = null;
  #now = null;
  #warmth = [];
  #recent = [];
  #sinceStart = false;
  #cursor = null;
  #timer = 0;
  #colours = null;

  constructor(root, toggle) {
    this.#root = root;
    this.#toggle = toggle;
    this.#canvas.setAttribute("role", "img");
    this.#here.setAttribute("aria-live", "polite");
    root.append(
      element("h2", {}, say("atWork")), this.#list(), this.#inMemory, this.#map,
    );
    this.#map.append(
      this.#choice(), this.#canvas, this.#here,
      element("p", { className: "hint", textContent: say("more") }),
    );
    toggle.onclick = () => this.show(root.hidden);
    this.#canvas.onpointermove = (event) => this.#point(event);
    this.#canvas.onpointerleave = () => this.#select(null);
    this.#canvas.onkeydown = (event) => this.#move(event);
    document.addEventListener("visibilitychange", () => this.#poll());
    const repaint = () => {
      this.#colours = null;
      this.#draw();
    };
    document.documentElement.addEventListener("themechange", repaint);
    new ResizeObserver(repaint).observe(this.#canvas.parentElement);
  }

  /** Offer the panel if the server tells of experts. Throws ApiError when it tells nothing now. */
  async offer() {
    try {
      this.#take(await get("experts"));
      this.#toggle.hidden = false;
    } catch (error) {
      if (!(error instanceof ApiError) || error.values.status === undefined) throw error;
    }
  }

  show(open) {
    this.#root.hidden = !open;
    this.#toggle.setAttribute("aria-expanded", String(open));
    this.#poll();
  }

  get isOpen() {
    return !this.#root.hidden;
  }

  /** Show the speed of an answer: the stream's `timings` and the size of the context. */
  speed(timings, context) {
    const used = timings.cache_n + timings.prompt_n + timings.predicted_n;
    if (timings.predicted_n > 1) this.#set("rate", number(timings.predicted_per_second, 1));
    if (timings.prompt_n > 1) {
      this.#set("prompt", say("perSecond", { rate: number(timings.prompt_per_second) }));
    }
    this.#set("context", context ? `${number(used)} / ${number(context)}` : number(used));
  }

  #list() {
    const list = element("dl", { className: "figures" });
    for (const name of ["rate", "prompt", "context", "memory", ...STORE]) {
      const value = element("dd", {}, "–");
      value.dataset.figure = name;
      this.#figures.set(name, value);
      list.append(element("div", { className: name }, element("dt", {}, say(name)), value));
    }
    return list;
  }

  #set(name, text) {
    this.#figures.get(name).textContent = text;
  }

  #choice() {
    const choose = (sinceStart) => {
      this.#sinceStart = sinceStart;
      recent.setAttribute("aria-pressed", String(!sinceStart));
      start.setAttribute("aria-pressed", String(sinceStart));
      this.#draw();
    };
    const recent = button("recent", () => choose(false));
    const start = button("sinceStart", () => choose(true));
    choose(false);
    return element("div", { className: "choice" }, recent, start);
  }

  async #poll() {
    clearTimeout(this.#timer);
    if (!this.isOpen || document.hidden) return;
    try {
      this.#take(await get("experts"));
      this.#draw();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#poll(), PERIOD);
  }

  #take(state) {
    this.#before = isLater(state, this.#now) ? this.#now : null;
    this.#now = { ...state, at: performance.now() };
    const before = this.#before?.used;
    this.#recent = state.used.map((row, layer) =>
      row.map((count, expert) => (before ? count - before[layer][expert] : 0)));
    this.#warmth = this.#recent.map((row, layer) =>
      row.map((count, expert) => count + KEPT * (this.#warmth[layer]?.[expert] ?? 0)));
    this.#map.hidden = state.layers.length === 0;
    this.#set("memory", state.resident_bytes > 0 ? bytes(state.resident_bytes) : "–");
    for (const name of STORE) this.#figures.get(name).parentElement.hidden = state.store === null;
    this.#inMemory.hidden = state.store !== null;
    if (state.store) this.#takeStore(state.store, this.#before?.store);
    this.#tell();
  }

  #takeStore(store, before) {
    const asked = store.hits + store.misses;
    this.#set("hits", asked > 0 ? percent(store.hits / asked) : "–");
    if (!before) return;
    const seconds = (this.#now.at - this.#before.at) / 1000;
    this.#set("waiting", percent((store.wait_us - before.wait_us) / 1e6 / seconds));
    this.#set("read", `${bytes((store.bytes_read - before.bytes_read) / seconds)}/s`);
  }

  // --- the map ---

  #draw() {
    if (!this.isOpen || this.#now === null || this.#map.hidden) return;
    const { layers, n_expert: experts } = this.#now;
    const width = this.#map.clientWidth;
    const tops = this.#tops();
    const height = tops.at(-1) + ROW;
    const scale = window.devicePixelRatio;
    this.#canvas.width = width * scale;
    this.#canvas.height = height * scale;
    this.#canvas.style.height = `${height}px`;
    this.#canvas.setAttribute("aria-label", say("heatLabel", { layers: layers.length, experts }));
    this.#colours ??= colours();
    const context = this.#canvas.getContext("2d");
    context.scale(scale, scale);
    context.font = "10px system-ui, sans-serif";
    context.textBaseline = "top";
    const cell = (width - MARGIN) / experts;
    const rows = this.#sinceStart ? this.#now.used : this.#warmth;
    const full = hot(rows);
    layers.forEach((layer, index) => {
      if (this.#startsPool(index)) {
        context.fillStyle = this.#colours.label;
        context.fillText(String(layer), 0, tops[index] - 1);
      }
      rows[index].forEach((count, expert) => {
        const heat = Math.min(Math.sqrt(count / full), 1);
        context.fillStyle = this.#colours.steps[Math.round(heat * (STEPS - 1))];
        context.fillRect(MARGIN + expert * cell, tops[index], cell - 0.75, ROW - 1);
      });
    });
    if (this.#cursor) {
      const { layer, expert } = this.#cursor;
      context.strokeStyle = this.#colours.label;
      context.lineWidth = 1.5;
      context.strokeRect(MARGIN + expert * cell - 0.5, tops[layer] - 0.5, cell, ROW);
    }
  }

  #startsPool(index) {
    return index === 0 || this.#now.pools[index] !== this.#now.pools[index - 1];
  }

  /** Where each layer's row begins; a gap separates pools. */
  #tops() {
    let top = 1 - GAP;
    return this.#now.layers.map((_, index) => {
      top += this.#startsPool(index) ? GAP : 0;
      const here = top;
      top += ROW;
      return here;
    });
  }

  #point(event) {
    if (this.#now === null) return;
    const box = this.#canvas.getBoundingClientRect();
    const { n_expert: experts } = this.#now;
    const cell = (box.width - MARGIN) / experts;
    const expert = Math.floor((event.clientX - box.left - MARGIN) / cell);
    const layer = this.#tops().findLastIndex((top) => top <= event.clientY - box.top);
    this.#select(expert >= 0 && expert < experts && layer >= 0 ? { layer, expert } : null);
  }

  #move(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    if (!step || this.#now === null) return;
    event.preventDefault();
    const { layer, expert } = this.#cursor ?? { layer: 0, expert: 0 };
    const within = (value, size) => Math.min(Math.max(value, 0), size - 1);
    this.#select({
      layer: within(layer + step[0], this.#now.layers.length),
      expert: within(expert + step[1], this.#now.n_expert),
    });
  }

  #select(cursor) {
    this.#cursor = cursor;
    this.#tell();
    this.#draw();
  }

  #tell() {
    if (!this.#cursor) {
      this.#here.textContent = "";
      return;
    }
    const { layer, expert } = this.#cursor;
    this.#here.textContent = say("here", {
      layer: this.#now.layers[layer],
      pool: this.#now.pools[layer],
      expert,
      recent: number(this.#recent[layer][expert]),
      total: number(this.#now.used[layer][expert]),
    });
  }
}

/** Whether a server that has said `before` can have gone on to `state`, or was started anew. */
function isLater(state, before) {
  const sum = ({ used, store }) => used.flat().reduce((one, other) => one + other, store?.hits ?? 0);
  return before !== null && state.layers.length === before.layers.length && sum(state) >= sum(before);
}

/** The count from which on a cell has the full colour: a few outliers must not darken the rest. */
function hot(rows) {
  const counts = rows.flat().filter((count) => count > 0.5).sort((one, other) => one - other);
  return Math.max(counts[Math.floor(counts.length * 0.98)] ?? 1, 1);
}

function colours() {
  const style = getComputedStyle(document.getElementById("panel"));
  const probe = element("span");
  document.getElementById("panel").append(probe);
  const steps = Array.from({ length: STEPS }, (_, step) => {
    probe.style.color = `color-mix(in oklab, var(--hot) ${(step / (STEPS - 1)) * 100}%, var(--cold))`;
    return getComputedStyle(probe).color;
  });
  probe.remove();
  return { steps, label: style.color };
}

function percent(share) {
  return `${number(share * 100, 1)} %`;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = count < 1 ? 0 : Math.min(Math.floor(Math.log2(count) / 10), 4);
  return `${number(count / 1024 ** power, power < 2 ? 0 : 1)} ${units[power]}`;
}
