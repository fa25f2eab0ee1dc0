"use strict";
/* Line charts and heat maps as SVG. Text goes in as text nodes alone, so no name of a run is ever read as markup. */

const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "path", "text", "circle", "rect", "title"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function format(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace("e+", "e").replace("-", "−");
  return value.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : size >= 0.1 ? 3 : 4).replace("-", "−");
}

function tickLabel(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
  return String(+value.toPrecision(4)).replace("-", "−");
}

function linearTicks(low, high, count, whole = false) {
  const rough = Math.max(whole ? 1 : 0, (high - low) / Math.max(1, count)), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999 && (!whole || Number.isInteger(s)));
  const ticks = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) ticks.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return ticks;
}

function logTicks(low, high, most) {
  if (high / low < 2.5) return linearTicks(low, high, most / 2);
  for (const factors of [[1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
      for (const f of factors) if (f * 10 ** p >= low * 0.999 && f * 10 ** p <= high * 1.001) ticks.push(f * 10 ** p);
    if (ticks.length <= most || factors.length === 1) return ticks.filter((_, i) => i % Math.ceil(ticks.length / most) === 0);
  }
}

/* The first drawing waits only until the running script has attached the node, so that no frame shows an empty chart.
   Later ones change sizes themselves, so they wait for the frame after the one in which the observer looked. */
function onResize(node, draw) {
  let width = 0;
  const look = () => {
    if (node.clientWidth === width) return;
    width = node.clientWidth;
    draw();
  };
  queueMicrotask(look);
  new ResizeObserver(() => requestAnimationFrame(look)).observe(node);
}

/* An exponential average with its start corrected, so that the first value is not pulled towards zero. */
function smoothed(points, amount) {
  if (!amount) return points;
  let sum = 0, weight = 0;
  return points.map(([x, y]) => {
    sum = amount * sum + (1 - amount) * y;
    weight = amount * weight + (1 - amount);
    return [x, sum / weight];
  });
}

const tip = {
  show(x, y, title, rows) {
    const box = document.getElementById("tip");
    box.replaceChildren(el("b", {}, title), ...rows.map(([color, name, value]) =>
      el("div", { class: "row", style: `--c:${color}` }, el("i", { class: "dot" }), el("span", {}, name), el("b", {}, value))));
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const left = x + 16 + width > innerWidth ? Math.max(6, x - width - 16) : x + 16;
    box.style.transform = `translate(${left}px, ${Math.max(6, Math.min(innerHeight - height - 6, y - height / 2))}px)`;
  },
  hide() { document.getElementById("tip").hidden = true; },
};

/* series: [{run, label, color, dash, points: [[x, y], ...], marks}]; settings is what all charts share:
   {hidden: Set of runs, smooth: 0..1}. Charts of one `link` move their crosshairs together. */
class LineChart {
  static all = [];

  constructor({ title, hint, series, log = false, smooth = true, names = null, xTitle = "step", link = "step", reference = [], settings, wide = false, range = null }) {
    Object.assign(this, { series, log, smooth, names, xTitle, link, reference, settings, range });
    this.canLog = !names && !range && series.every((s) => s.points.every(([, y]) => y > 0));
    this.log = log && this.canLog;
    this.plot = el("div", {
      class: "plot", tabindex: 0, role: "img", "aria-label": this.describe(title),
      onpointermove: (e) => this.point(e), onpointerdown: (e) => this.point(e), onpointerleave: () => this.leave(),
      onkeydown: (e) => this.key(e), onblur: () => this.leave(),
    });
    const buttons = [];
    if (this.canLog) buttons.push(this.toggle("log", this.log, (on) => { this.log = on; this.draw(); }));
    buttons.push(this.toggle("wide", wide, (on) => { this.node.classList.toggle("wide", on); this.draw(); }));
    buttons.at(-1).classList.add("wider");
    this.node = el("article", { class: `card chart${wide ? " wide" : ""}` },
      el("header", {}, el("h3", {}, title, hint ? el("span", { class: "hint" }, hint) : null), ...buttons), this.plot);
    LineChart.all.push(this);
    onResize(this.plot, () => this.draw());
  }

  describe(title) {
    const ends = this.series.map((s) => s.points.length ? `${s.label} ends at ${format(s.points.at(-1)[1])}` : `${s.label} has no values`);
    return `${title} over ${this.xTitle}: ${ends.join("; ")}. Arrow keys move the cursor.`;
  }

  toggle(label, on, change) {
    const button = el("button", { class: "small", type: "button", "aria-pressed": String(on) }, label);
    button.addEventListener("click", () => {
      on = !on;
      button.setAttribute("aria-pressed", String(on));
      change(on);
    });
    return button;
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    const height = Math.round(Math.min(340, Math.max(210, width * 0.5)));
    const shown = this.series.filter((s) => !this.settings.hidden.has(s.run) && s.points.length);
    const amount = this.smooth ? this.settings.smooth : 0;
    this.lines = shown.map((s) => ({ ...s, drawn: smoothed(s.points, amount) }));
    const xs = shown.flatMap((s) => s.points.map(([x]) => x)), ys = shown.flatMap((s) => s.points.map(([, y]) => y));
    for (const r of this.reference) if (!this.log || r.value > 0) ys.push(r.value);
    const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, height });
    this.plot.replaceChildren(svg);
    if (!xs.length) return;

    let [low, high] = this.range ?? this.limits(ys);
    const left = 50, right = 10, top = 10, bottom = this.names ? 62 : 24;
    const [first, last] = [Math.min(...xs), Math.max(...xs)];
    const inner = width - left - right, tall = height - top - bottom, scale = this.log ? Math.log : (v) => v;
    this.x = (v) => left + (last > first ? ((v - first) / (last - first)) * inner : inner / 2);
    this.y = (v) => top + tall * (1 - (scale(v) - scale(low)) / (scale(high) - scale(low)));
    for (const t of this.log ? logTicks(low, high, tall / 24) : linearTicks(low, high, tall / 38)) {
      svg.append(el("line", { class: "gridline", x1: left, x2: width - right, y1: this.y(t), y2: this.y(t) }),
        el("text", { x: left - 8, y: this.y(t) + 4, "text-anchor": "end" }, tickLabel(t)));
    }
    svg.append(el("line", { class: "axis", x1: left, x2: width - right, y1: top + tall, y2: top + tall }));
    this.xAxis(svg, first, last, inner, top + tall);
    for (const r of this.reference) if (!this.log || r.value > 0)
      svg.append(el("line", { class: "reference", x1: left, x2: width - right, y1: this.y(r.value), y2: this.y(r.value) }),
        el("text", { x: width - right - 2, y: this.y(r.value) - 5, "text-anchor": "end" }, r.label));
    for (const s of this.lines) {
      const style = `--c:${s.color}`;
      if (amount) svg.append(el("path", { class: "curve raw", style, d: this.path(s.points) }));
      svg.append(el("path", { class: "curve", style, d: this.path(s.drawn), "stroke-dasharray": s.dash }));
      if (s.points.length <= 40) for (const [x, y] of s.drawn) svg.append(el("circle", { class: "point", style, cx: this.x(x), cy: this.y(y), r: 3.4 }));
    }
    this.cursor = el("g");
    svg.append(this.cursor);
    this.box = { left, right: width - right, top, bottom: top + tall };
  }

  limits(ys) {
    let [low, high] = [Math.min(...ys), Math.max(...ys)];
    if (this.log) return [low * 0.94, high * 1.06];
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
  }

  xAxis(svg, first, last, inner, bottom) {
    if (this.names) {
      const tilted = inner / this.names.length < 52, every = Math.ceil((this.names.length * 15) / inner);
      this.names.forEach((name, i) => {
        if (i % every) return;
        const x = this.x(i), y = bottom + 17;
        svg.append(el("text", tilted ? { x, y, "text-anchor": "end", transform: `rotate(-45 ${x} ${y - 4})` } : { x, y, "text-anchor": "middle" }, name));
      });
      return;
    }
    for (const t of (last > first ? linearTicks(first, last, inner / 78, this.xTitle === "step") : [first]).filter((t) => this.x(t) > 66))
      svg.append(el("text", { x: this.x(t), y: bottom + 17, "text-anchor": "middle" }, tickLabel(t)));
    svg.append(el("text", { x: 42, y: bottom + 17, "text-anchor": "end" }, this.xTitle));
  }

  path(points) {
    return points.map(([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("");
  }

  steps() { return [...new Set((this.lines ?? []).flatMap((s) => s.points.map(([x]) => x)))].sort((a, b) => a - b); }

  point(event) {
    if (!this.box) return;
    const rect = this.plot.getBoundingClientRect(), x = event.clientX - rect.left;
    const steps = this.steps();
    const nearest = steps.reduce((best, s) => Math.abs(this.x(s) - x) < Math.abs(this.x(best) - x) ? s : best, steps[0]);
    this.at(nearest, event.clientX, event.clientY);
  }

  key(event) {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key) || !this.box) return;
    event.preventDefault();
    const steps = this.steps(), i = steps.indexOf(this.current ?? steps.at(-1));
    const next = steps[Math.max(0, Math.min(steps.length - 1, i + (event.key === "ArrowRight" ? 1 : -1)))];
    const rect = this.plot.getBoundingClientRect();
    this.at(next, rect.left + this.x(next), rect.top + 60);
  }

  at(step, clientX, clientY) {
    if (step === undefined) return;
    this.current = step;
    for (const chart of LineChart.all) if (chart.link === this.link) chart.cross(step);
    const rows = this.lines.map((s) => [s.color, s.label, s.drawn.find(([x]) => x === step)]).filter(([, , p]) => p);
    const title = this.names ? this.names[step] : `${this.xTitle} ${format(step)}`;
    tip.show(clientX, clientY, title, rows.map(([c, l, p]) => [c, l, format(p[1])]));
  }

  cross(step) {
    if (!this.box || !this.lines.length) return;
    const x = this.x(step);
    this.cursor.replaceChildren();
    if (x < this.box.left - 1 || x > this.box.right + 1) return;
    this.cursor.append(el("line", { class: "crosshair", x1: x, x2: x, y1: this.box.top, y2: this.box.bottom }));
    for (const s of this.lines) {
      const p = s.drawn.find(([v]) => v === step);
      if (p) this.cursor.append(el("circle", { class: "point", style: `--c:${s.color}`, cx: x, cy: this.y(p[1]), r: 4.2 }));
    }
  }

  leave() {
    this.current = undefined;
    for (const chart of LineChart.all) if (chart.link === this.link) chart.cursor?.replaceChildren();
    tip.hide();
  }
}

const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

function heatColor(share) {
  const at = Math.max(0, Math.min(1, share)) * (RAMP.length - 1), i = Math.min(RAMP.length - 2, Math.floor(at));
  return RAMP[i].map((c, k) => Math.round(c + (RAMP[i + 1][k] - c) * (at - i)));
}

/* values[row][column], null where there is none; `strong` rows are marked with a dot. */
class HeatMap {
  constructor({ rows, columns, values, low, high, strong = [], xTitle, color, name }) {
    Object.assign(this, { rows, columns, values, low, high, strong, xTitle, color, name });
    this.node = el("div", { class: "heat", role: "img", "aria-label": `Heat map of ${name}: rows ${rows.join(", ")}; columns ${xTitle} ${columns.join(", ")}` });
    onResize(this.node, () => this.draw());
  }

  draw() {
    const width = this.node.clientWidth;
    if (!width) return;
    const left = 12 + 6.6 * Math.max(4, ...this.rows.map((r) => r.length)) + 10, bottom = 24;
    const cell = (width - left) / this.columns.length, tall = Math.max(18, Math.min(30, cell * 0.7)), gap = 1.5;
    const height = this.rows.length * tall + bottom;
    const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, height });
    this.rows.forEach((row, i) => {
      const y = i * tall, strong = this.strong.includes(row);
      if (strong) svg.append(el("circle", { cx: 5, cy: y + tall / 2, r: 3.6, style: `fill:${this.color}` }));
      svg.append(el("text", { x: left - 8, y: y + tall / 2 + 4, "text-anchor": "end", style: strong ? "font-weight:700;fill:var(--text)" : "" }, row));
      this.columns.forEach((column, j) => {
        const value = this.values[i][j], x = left + j * cell;
        if (value === null || value === undefined) {
          svg.append(el("rect", { x, y, width: cell - gap, height: tall - gap, rx: 3, style: "fill:var(--grid)" }));
          return;
        }
        const rgb = heatColor((value - this.low) / (this.high - this.low || 1));
        const dark = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 125;
        svg.append(el("rect", { x, y, width: cell - gap, height: tall - gap, rx: 3, fill: `rgb(${rgb})`,
          onpointermove: (e) => tip.show(e.clientX, e.clientY, `${row}, ${this.xTitle} ${column}`, [[`rgb(${rgb})`, this.name, format(value)]]),
          onpointerleave: () => tip.hide() }));
        if (cell > 33) svg.append(el("text", { x: x + (cell - gap) / 2, y: y + tall / 2 + 3.5, "text-anchor": "middle", "pointer-events": "none", style: `font-size:11px;fill:${dark ? "#fff" : "#14181f"}` }, value.toFixed(2)));
      });
    });
    const every = Math.ceil((this.columns.length * 32) / (width - left));
    this.columns.forEach((column, j) => {
      if (j % every === 0) svg.append(el("text", { x: left + (j + 0.5) * cell, y: height - bottom + 15, "text-anchor": "middle" }, String(column)));
    });
    svg.append(el("text", { x: left - 8, y: height - bottom + 15, "text-anchor": "end" }, this.xTitle));
    this.node.replaceChildren(svg);
  }
}
