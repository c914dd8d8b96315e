"use strict";
// The points of runs, and the charts that draw them. What a server sends are buckets: how many rows each holds, where it
// begins on each axis, and of each column the mean, the least and the greatest.

const AXES = ["step", "tokens", "seconds"];
const DASHES = [[], [6, 4], [2, 3], [10, 4, 2, 4]];
const COLOURS = 8;

/** Returns the points of a table with new buckets put in place; those that are known already stay. */
function merged(known, part) {
  const fits = known && known.size === part.size && part.first > 0;
  const out = fits ? known : {size: part.size, n: [], step: [], tokens: [], seconds: [], columns: {}};
  const first = fits ? part.first : 0;
  for (const name of ["n", ...AXES]) {
    out[name].length = Math.min(out[name].length, first);
    for (const x of part[name]) out[name].push(x);
  }
  const length = out.n.length;
  const empty = () => ({mean: [], low: null, high: null, gaps: new Set()});
  for (const name of new Set([...Object.keys(out.columns), ...Object.keys(part.columns)])) {
    const column = (out.columns[name] ??= empty());
    const more = part.columns[name];
    for (const key of ["mean", "low", "high"]) {
      if (key !== "mean" && part.size === 1) continue;
      const values = (column[key] ??= []);
      values.length = Math.min(values.length, first);
      while (values.length < first) values.push(null);
      if (more) for (const x of more[key]) values.push(x);
      while (values.length < length) values.push(null);
    }
    for (const i of column.gaps) if (i >= first) column.gaps.delete(i);
    if (more) for (const i of more.gaps) column.gaps.add(i + first);
  }
  return out;
}

/** Returns the curve of a column: `x`, `main` (the mean, smoothed), `low`, `high`, and `gaps`, the x of what is not finite.
 * Rows without a value are left out; null stands where a value is not finite. */
function curveOf(table, name, axis, share, log) {
  const column = table?.columns[name];
  const out = {x: [], main: [], low: [], high: [], gaps: []};
  if (!column) return out;
  const weights = [];
  const drawn = (v) => (v === null || (log && v <= 0) ? null : v);
  for (let i = 0; i < table.n.length; i++) {
    const mean = column.mean[i], gap = column.gaps.has(i);
    if (gap) out.gaps.push(table[axis][i]);
    if (mean === null && !gap) continue;
    const last = out.x.length - 1;
    if (last >= 0 && table[axis][i] <= out.x[last]) { // an axis that stands still, such as tokens between validations
      out.x.pop(), out.main.pop(), out.low.pop(), out.high.pop(), weights.pop();
    }
    out.x.push(table[axis][i]);
    out.main.push(mean);
    out.low.push(drawn(column.low ? column.low[i] : mean));
    out.high.push(drawn(column.high ? column.high[i] : mean));
    weights.push(mean === null ? 0 : table.n[i]);
  }
  out.main = smooth(out.main, weights, share).map(drawn);
  return out;
}

/** Returns the means over a share of the curve around each point, over less of it near its ends, so that they don't lag. */
function smooth(values, weights, share) {
  const half = Math.floor((share * values.length) / 2);
  if (half < 1) return values;
  const sums = new Float64Array(values.length + 1), counts = new Float64Array(values.length + 1);
  values.forEach((v, i) => {
    sums[i + 1] = sums[i] + (v ?? 0) * weights[i];
    counts[i + 1] = counts[i] + weights[i];
  });
  return values.map((v, i) => {
    if (v === null) return null;
    const reach = Math.min(half, i, values.length - 1 - i);
    return (sums[i + reach + 1] - sums[i - reach]) / (counts[i + reach + 1] - counts[i - reach]);
  });
}

/** Returns a number as people read it: four digits, with units where it is large. */
function shown(x, digits = 4) {
  if (x === null || x === undefined) return "–";
  if (typeof x === "string") return x;
  const size = Math.abs(x);
  for (const [limit, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= limit) return trimmed(x / (limit === 1e4 ? 1e3 : limit), digits) + " " + unit;
  return size !== 0 && size < 1e-3 ? x.toExponential(digits - 2).replace(/\.?0+e/, "e") : trimmed(x, digits);
}

/** Round times between two ticks of an axis, from a hundredth of a second to ten thousand days, and how one is written. */
const SECONDS = [0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200,
  ...[1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 1e4].map((days) => days * 86400)];
const tick = (x) => (x && x % 86400 === 0 ? `${x / 86400} d` : x && x % 3600 === 0 ? `${x / 3600} h` : x && x % 60 === 0 ? `${x / 60} min` : `${trimmed(x, 4)} s`);

const trimmed = (x, digits) => String(Number(x.toPrecision(digits)));

/** Returns seconds as people say them. */
function time(seconds) {
  const s = Math.max(0, Math.round(seconds));
  const [days, hours, minutes] = [Math.floor(s / 86400), Math.floor(s / 3600) % 24, Math.floor(s / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${String(minutes).padStart(2, "0")} min`;
  return minutes ? `${minutes} min ${String(s % 60).padStart(2, "0")} s` : `${s} s`;
}

const place = (axis, x) => (axis === "seconds" ? time(x) : axis === "step" ? `step ${Math.round(x).toLocaleString("en")}` : `${shown(x)} tokens`);

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (slot, many) => style(many ? `--run${slot % COLOURS}` : "--line");

/** A Chart draws a column of one or several runs. `ask` gives what is chosen for all charts: axis, smoothing, log, zoom, ends of
 * x; `tell` is called with a range to zoom to. */
class Chart {
  constructor(panel, ask, tell) {
    Object.assign(this, {panel, ask, tell, runs: [], dirty: false, visible: false, plot: null, curves: []});
    this.caption = element("figcaption", {}, element("h3", {}, panel.title), (this.legend = element("div", {class: "legend"})));
    this.body = element("div", {class: "chart", tabindex: "0", role: "application", "aria-roledescription": "chart"});
    this.node = element("figure", {}, this.caption, this.body);
    this.body.addEventListener("keydown", (event) => this.key(event));
    this.body.addEventListener("blur", () => this.plot?.setCursor({left: -10, top: -10}));
    new IntersectionObserver(([entry]) => {
      this.visible = entry.isIntersecting;
      if (this.visible) this.draw();
    }, {rootMargin: "200px"}).observe(this.node);
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.body);
  }

  size() {
    const width = Math.max(200, Math.floor(this.body.clientWidth));
    return {width, height: Math.round(Math.min(260, Math.max(170, width * 0.5)))};
  }

  /** Takes the runs to draw, each with `name`, `slot` (its colour), and `table(kind)`; `anew` where they are drawn in
   * another way than before. */
  show(runs, anew) {
    const same = runs.length === this.runs.length && runs.every((run, i) => run === this.runs[i]);
    this.runs = runs;
    this.dirty = true;
    if (anew || !same) this.stale = true;
    if (this.visible) this.draw();
  }

  draw() {
    if (!this.dirty) return;
    this.dirty = false;
    const {axis, smoothing, log} = this.ask();
    const [kind, name] = [this.panel.key.slice(0, 5), this.panel.key.slice(6)];
    const share = this.panel.smooth ? smoothing : 0;
    this.curves = this.runs.map((run) => curveOf(run.table(kind), name, axis, share, log));
    const tables = this.curves.map((c) => [c.x, c.low, c.high, c.main]);
    const data = tables.length === 1 ? tables[0] : uPlot.join(tables);
    if (this.stale || !this.plot) {
      this.plot?.destroy();
      this.plot = new uPlot(this.options(axis, log), data, this.body);
      this.stale = false;
    } else this.plot.setData(data);
    this.tellLegend();
  }

  options(axis, log) {
    const ink = style("--soft"), grid = {stroke: style("--grid"), width: 1};
    const font = "11px system-ui, sans-serif", {many} = this.ask();
    const series = [{}], bands = [];
    for (const run of this.runs) {
      const colour = colourOf(run.slot, many), faint = {stroke: colour + "45", width: 1, points: {show: false}};
      const first = series.length;
      series.push(faint, {...faint}, {
        stroke: colour, width: 1.6, dash: DASHES[Math.floor(run.slot / COLOURS) % DASHES.length],
        points: {show: (u, i, from, to) => to - from < 40, size: 5, fill: colour},
      });
      bands.push({series: [first + 1, first], fill: colour + "38"});
    }
    return {
      ...this.size(), series, bands, padding: [8, 20, 0, 0], legend: {show: false},
      scales: {
        x: {time: false, range: () => this.ask().zoom ?? this.ask().ends},
        y: {distr: log ? 3 : 1, range: (u, low, high) => this.range(low, high, log)},
      },
      axes: [
        {stroke: ink, grid, font, ticks: {show: false}, size: 26, space: 64, ...(axis === "seconds" ? {incrs: SECONDS} : {}),
          values: (u, splits) => splits.map((x) => (axis === "seconds" ? tick(x) : shown(x, 3)))},
        {stroke: ink, grid, font, ticks: {show: false}, size: 54, space: 34, values: (u, splits) => splits.map((x) => (x === null ? "" : shown(x, 4)))},
      ],
      cursor: {
        sync: {key: "runs", setSeries: false, scales: ["x", null]}, drag: {x: true, y: false, setScale: false}, y: false,
        dataIdx: (u, i, at) => nearest(u.data[i], at), points: {size: (u, i) => (i % 3 ? 0 : 7)},
        bind: {dblclick: () => () => this.tell(null)},
      },
      hooks: {
        setCursor: [() => this.tellLegend()],
        setSelect: [(u) => {
          if (u.select.width < 4) return;
          this.tell([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
          u.setSelect({left: 0, top: 0, width: 0, height: 0}, false);
        }],
        draw: [(u) => this.drawMarks(u)],
      },
    };
  }

  /** Returns the range of y. Of training curves it leaves out the first twentieth where that would press the rest flat. */
  range(low, high, log) {
    const {zoom, ends} = this.ask();
    let [least, most] = this.extent(...(zoom ?? [-Infinity, Infinity]));
    if (this.panel.smooth && !zoom) {
      const late = this.extent(ends[0] + 0.05 * (ends[1] - ends[0]), Infinity);
      const ratio = log ? Math.log(most / least) / Math.log(late[1] / late[0]) : (most - least) / (late[1] - late[0]);
      if (late[0] < late[1] && ratio > 2) [least, most] = late;
    }
    if (least > most) [least, most] = [low ?? 0, high ?? 1];
    if (log) return uPlot.rangeLog(Math.max(least, 1e-300), Math.max(most, 1e-300), 10, false);
    const room = 0.06 * (most - least) || Math.abs(most) * 0.05 || 1;
    return [least - room, most + room];
  }

  /** Returns the least and the greatest value between two places. */
  extent(from, to) {
    let [least, most] = [Infinity, -Infinity];
    for (const c of this.curves)
      for (let i = 0; i < c.x.length; i++) {
        if (c.x[i] < from || c.x[i] > to || c.low[i] === null || c.high[i] === null) continue;
        if (c.low[i] < least) least = c.low[i];
        if (c.high[i] > most) most = c.high[i];
      }
    return [least, most];
  }

  /** Draws the best point, and a tick at the bottom for each value that is not finite. */
  drawMarks(u) {
    const {axis} = this.ask(), context = u.ctx, ratio = devicePixelRatio || 1, {left, top, width, height} = u.bbox;
    context.save();
    context.beginPath();
    context.rect(left - 6 * ratio, top - 6 * ratio, width + 12 * ratio, height + 12 * ratio);
    context.clip();
    this.curves.forEach((curve) => {
      context.fillStyle = style("--bad");
      for (const x of curve.gaps) context.fillRect(Math.round(u.valToPos(x, "x", true)) - ratio, top + height - 12 * ratio, 2 * ratio, 12 * ratio);
    });
    const best = !this.ask().many && this.runs[0]?.best?.(this.panel.key);
    if (best && !(this.ask().log && best.value <= 0)) {
      context.fillStyle = style("--best");
      context.beginPath();
      context.arc(u.valToPos(best[axis], "x", true), u.valToPos(best.value, "y", true), 4.5 * ratio, 0, 7);
      context.fill();
    }
    context.restore();
  }

  /** Says beside the title what stands under the cursor; else the best value, or the newest. */
  tellLegend() {
    const {axis, many} = this.ask(), index = this.plot?.cursor.idx;
    const under = index !== null && index !== undefined && this.plot.cursor.left >= 0;
    const parts = this.runs.map((run, i) => {
      const curve = this.curves[i], at = under ? nearest(this.plot.data[3 * i + 3], index) : null;
      const value = under ? this.plot.data[3 * i + 3]?.[at] : curve?.main.findLast((x) => x !== null);
      const best = !many && !under && run.best?.(this.panel.key);
      const words = best ? `${best.word} ${shown(best.value)}, ${place(axis, best[axis])}` : shown(value);
      const key = many ? element("i", {class: "swatch", "data-colour": `run${run.slot % COLOURS}`}) : null;
      return element("span", {class: best ? "best" : ""}, key, many ? `${run.name} ` : "", element("b", {}, words));
    });
    const where = under ? place(axis, this.plot.data[0][index]) : null;
    this.legend.replaceChildren(...(where ? [element("span", {}, where)] : []), ...parts);
    const gaps = this.curves.reduce((n, c) => n + c.gaps.length, 0);
    this.body.setAttribute("aria-label", `${this.panel.title}: ${parts.map((p) => p.textContent).join(", ")}${gaps ? `; ${gaps} not finite` : ""}. Arrow keys read values, plus and minus zoom, Escape shows all.`);
    return [where, ...parts.map((p) => p.textContent)].filter(Boolean).join(", ");
  }

  key(event) {
    const xs = this.plot?.data[0];
    if (!xs?.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const {zoom, ends} = this.ask(), [low, high] = zoom ?? ends;
    const at = this.plot.cursor.left >= 0 ? this.plot.cursor.idx ?? -1 : -1;
    const stride = event.shiftKey ? Math.max(1, Math.round(xs.length / 20)) : 1;
    const inside = (i) => Math.min(xs.findLastIndex((x) => x <= high), Math.max(xs.findIndex((x) => x >= low), i));
    const middle = at >= 0 ? xs[at] : (low + high) / 2;
    const moves = {
      ArrowRight: () => inside(at < 0 ? 0 : at + stride), ArrowLeft: () => inside(at < 0 ? xs.length - 1 : at - stride),
      Home: () => inside(0), End: () => inside(xs.length - 1),
    };
    const zooms = {"+": 0.25, "=": 0.25, "-": 1};
    if (event.key in moves) {
      this.plot.setCursor({left: this.plot.valToPos(xs[moves[event.key]()], "x"), top: 10});
      document.getElementById("live").textContent = this.tellLegend();
    } else if (event.key in zooms) {
      const half = (high - low) * zooms[event.key], wide = [Math.max(ends[0], middle - half), Math.min(ends[1], middle + half)];
      this.tell(wide[0] <= ends[0] && wide[1] >= ends[1] ? null : wide);
    } else if (event.key === "Escape") this.tell(null);
    else return;
    event.preventDefault();
  }
}

/** Returns the index of the value nearest to an index, of those that there are. */
function nearest(values, at) {
  if (!values || at === null || at === undefined) return null;
  for (let d = 0; d < values.length; d++) {
    if (values[at - d] !== null && values[at - d] !== undefined) return at - d;
    if (values[at + d] !== null && values[at + d] !== undefined) return at + d;
    if (at - d < 0 && at + d >= values.length) break;
  }
  return at;
}
