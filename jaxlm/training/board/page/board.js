"use strict";
// The page: which runs are shown, what is asked of the server, and where it goes. In a report the views stand in the page.

const byId = (id) => document.getElementById(id);
const EVERY = 2000; // milliseconds between two looks at the runs
const LISTED = 100; // runs that are listed at once

const state = {axis: "step", smoothing: 0.22, log: false, zoom: null, runs: [], shown: new Map(), listed: LISTED, clock: 0};
let charts = new Map(), looking = null, wanted = false, failures = 0;

// ------------------------------------------------------------------------------------------------- where values come from

async function get(address) {
  const answer = await fetch(address, {headers: {Accept: "application/json"}});
  const date = Date.parse(answer.headers.get("Date") ?? "");
  if (date) state.clock = date - Date.now();
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.json();
}

const live = {
  runs: () => get("api/runs"),
  run: (id, since) => get(`api/run?run=${encodeURIComponent(id)}&since=${encodeURIComponent(since)}`),
  zoom: (id, axis, [low, high]) => get(`api/zoom?run=${encodeURIComponent(id)}&axis=${axis}&low=${low}&high=${high}`),
};

/** A report's own views. */
function written(views) {
  return {
    runs: async () => ({root: "", runs: views.map((view) => ({...view.brief, id: view.id, kind: view.kind}))}),
    run: async (id) => views.find((view) => view.id === id),
    zoom: async () => null,
  };
}

const source = byId("data") ? written(JSON.parse(byId("data").textContent)) : live;
const isLive = source === live;

// ----------------------------------------------------------------------------------------------------------- runs shown

/** A Shown is a run that is shown, with all that was sent of it. */
class Shown {
  constructor(id, slot) {
    Object.assign(this, {id, slot, cursor: "", brief: null, tables: {}, near: null, sections: new Map(), order: [], panels: [], config: {}, whole: 0});
  }

  get name() {
    return this.brief?.name ?? this.id;
  }

  table(kind) {
    return this.near?.[kind] ?? this.tables[kind];
  }

  best(key) {
    return this.panels.find((panel) => panel.key === key)?.best;
  }

  take(view) {
    if (view.reset) Object.assign(this, {tables: {}, sections: new Map(), near: null});
    for (const kind of ["train", "valid"]) if (view[kind]) this.tables[kind] = merged(this.tables[kind], view[kind]);
    for (const section of view.sections ?? []) this.sections.set(section.id, section);
    this.fresh = new Set((view.sections ?? []).map((section) => section.id));
    for (const name of ["cursor", "brief", "whole", "kind"]) this[name] = view[name];
    for (const name of ["order", "panels", "config"]) if (view[name]) this[name] = view[name];
  }
}

function select(ids, push = true) {
  const before = state.shown;
  state.shown = new Map();
  for (const id of ids) state.shown.set(id, before.get(id) ?? new Shown(id, -1));
  const taken = new Set([...state.shown.values()].map((run) => run.slot));
  for (const run of state.shown.values()) {
    if (run.slot >= 0) continue;
    for (run.slot = 0; taken.has(run.slot); run.slot++);
    taken.add(run.slot);
  }
  state.zoom = null;
  for (const run of state.shown.values()) run.near = null;
  const address = "#" + ids.map((id) => `run=${encodeURIComponent(id)}`).join("&");
  if (push && isLive && address !== location.hash) history.pushState(null, "", address);
  byId("sections").replaceChildren();
  byId("top").replaceChildren();
  list();
  page(true);
  look();
}

const inAddress = () => new URLSearchParams(location.hash.slice(1)).getAll("run");

// -------------------------------------------------------------------------------------------------------------- the list

const STATES = {running: "running", finished: "finished", stalled: "stalled", stopped: "stopped", unfinished: "unfinished"};

function list() {
  if (!isLive) return;
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = state.runs.filter((run) => words.every((word) => `${run.id} ${run.name} ${run.about} ${run.state}`.toLowerCase().includes(word)));
  byId("count").textContent = found.length === state.runs.length ? String(found.length) : `${found.length} of ${state.runs.length}`;
  byId("more").hidden = found.length <= state.listed;
  const had = new Map([...byId("runs").children].map((node) => [node.dataset.id, node]));
  const rows = found.slice(0, state.listed).map((run) => {
    const chosen = state.shown.get(run.id), text = JSON.stringify([run, chosen?.slot, state.shown.size]);
    const old = had.get(run.id);
    if (old?.dataset.text === text) return old;
    const node = row(run, chosen);
    node.dataset.text = text;
    if (old?.contains(document.activeElement)) requestAnimationFrame(() => node.querySelector(document.activeElement?.tagName === "INPUT" ? "input" : "button")?.focus());
    return node;
  });
  const now = [...byId("runs").children];
  if (rows.length !== now.length || rows.some((node, i) => node !== now[i])) {
    const focused = document.activeElement?.closest?.("#runs li")?.dataset.id, tag = document.activeElement?.tagName;
    byId("runs").replaceChildren(...rows);
    if (focused) rows.find((node) => node.dataset.id === focused)?.querySelector(tag === "INPUT" ? "input" : "button")?.focus();
  }
  ages();
}

function row(run, chosen) {
  const box = element("input", {type: "checkbox", "aria-label": `Compare ${run.name}`});
  box.checked = Boolean(chosen);
  box.addEventListener("change", () => {
    const ids = [...state.shown.keys()].filter((id) => id !== run.id);
    select(box.checked ? [...ids, run.id] : ids);
  });
  const folder = run.id.includes("/") ? run.id.slice(0, run.id.lastIndexOf("/") + 1) : "";
  const name = element("button", {type: "button", class: "name"}, folder ? element("small", {}, folder) : null, run.name);
  name.addEventListener("click", () => select([run.id]));
  const steps = run.steps ? `${run.step.toLocaleString("en")} / ${run.steps.toLocaleString("en")}` : run.step.toLocaleString("en");
  const swatch = chosen && state.shown.size > 1 ? element("i", {class: "swatch", "data-colour": `run${chosen.slot % COLOURS}`}) : null;
  const node = element("li", {class: chosen ? "chosen" : "", "data-id": run.id}, box,
    element("div", {}, element("div", {}, swatch, name),
      element("small", {}, element("span", {class: `state ${STATES[run.state] ?? ""}`}, run.state), ` ${steps}`,
        run.loss === null ? "" : ` · loss ${shown(run.loss)}`, " ", element("span", {class: "age", "data-unix": String(run.updated)}))));
  if (run.alerts.length) node.querySelector(".state").title = run.alerts.join("\n");
  return node;
}

/** Says how long ago each run wrote its last line. */
function ages() {
  const now = (Date.now() + state.clock) / 1000;
  for (const node of document.querySelectorAll("[data-unix]")) {
    const unix = Number(node.dataset.unix), text = unix ? `· ${time(now - unix)} ago` : "";
    if (node.textContent !== text) node.textContent = text;
  }
}

// -------------------------------------------------------------------------------------------------------------- the page

function ends() {
  let most = 0, least = Infinity;
  for (const run of state.shown.values())
    for (const kind of ["train", "valid"]) {
      const xs = run.tables[kind]?.[state.axis];
      if (xs?.length) (most = Math.max(most, xs[xs.length - 1])), (least = Math.min(least, xs[0]));
    }
  return least < most ? [least, most] : [Math.min(least, most), most + 1];
}

/** Draws what is shown; `anew` where other runs are, or curves are drawn in another way. */
function page(anew = false) {
  const runs = [...state.shown.values()].filter((run) => run.brief), one = runs.length === 1 ? runs[0] : null;
  byId("title").textContent = one ? one.name : runs.length ? `${runs.length} runs` : state.shown.size ? "…" : state.awaited?.length ? `Waiting for ${state.awaited.join(", ")}` : state.runs.length ? "Choose a run" : isLive ? "No runs yet" : "";
  byId("about").replaceChildren(...(one ? about(one) : runs.length ? [runs.map((run) => run.name).join(" · ")] : []));
  const told = runs.flatMap((run) => run.brief.alerts.map((line) => (one ? line : `${run.name}: ${line}`)));
  if (byId("alerts").dataset.told !== JSON.stringify(told)) {
    byId("alerts").dataset.told = JSON.stringify(told);
    byId("alerts").replaceChildren(...told.map((line) => element("p", {class: "warning"}, line)));
  }
  document.title = one ? `${one.brief.state === "running" ? `${one.brief.step.toLocaleString("en")} · ` : ""}${one.name}` : byId("title").textContent;
  drawCharts(runs, anew);
  texts(runs, one);
}

function about(run) {
  const {brief} = run, steps = brief.steps ? `step ${brief.step.toLocaleString("en")} of ${brief.steps.toLocaleString("en")}` : `step ${brief.step.toLocaleString("en")}`;
  const reading = run.whole < 1 ? ` · reading its log, ${Math.round(100 * run.whole)} %` : "";
  return [element("span", {class: `state ${brief.state}`}, brief.state), ` · ${[run.kind === "stream" ? "" : steps, brief.about].filter(Boolean).join(" · ")}${reading} `,
    brief.updated && isLive ? element("span", {class: "age", "data-unix": String(brief.updated)}) : ""].filter(Boolean);
}

function drawCharts(runs, anew) {
  const panels = new Map();
  for (const run of runs) for (const panel of run.panels) if (!panels.has(panel.key)) panels.set(panel.key, panel);
  byId("curves").hidden = panels.size === 0;
  const chosen = {axis: state.axis, smoothing: (state.smoothing ** 2) / 2, log: state.log, zoom: state.zoom, ends: ends(), many: runs.length > 1};
  byId("unzoom").hidden = !state.zoom;
  const ask = () => drawCharts.chosen;
  drawCharts.chosen = chosen;
  const kept = new Map();
  for (const [key, panel] of panels) kept.set(key, charts.get(key)?.panel.group === panel.group ? charts.get(key) : new Chart(panel, ask, zoomTo));
  const order = [...kept.keys()].join("\n");
  if (order !== drawCharts.order) {
    drawCharts.order = order;
    for (const [key, chart] of charts) if (kept.get(key) !== chart) chart.plot?.destroy();
    charts = kept;
    const groups = Object.groupBy([...charts.values()], (chart) => chart.panel.group);
    byId("charts").replaceChildren(...Object.entries(groups).map(([name, inside]) =>
      element("section", {"aria-label": name}, element("h2", {}, name), element("div", {class: "charts"}, ...inside.map((chart) => chart.node)))));
  }
  for (const [key, chart] of charts) chart.show(runs.filter((run) => run.panels.some((panel) => panel.key === key)), anew || chart.runs.length === 0);
}

/** Puts sections in place; of one run those that changed, of several a comparison. */
function texts(runs, one) {
  const place = byId("sections"), top = byId("top");
  const wantedIds = one ? one.order : [];
  if (one) {
    const old = new Map([...top.children, ...place.children].map((node) => [node.id, node]));
    const nodes = wantedIds.map((id) => {
      const before = old.get(`section-${id}`);
      return before && !one.fresh.has(id) ? before : sectionNode(one.sections.get(id), before);
    });
    one.fresh = new Set();
    const isTop = (node) => ["section-summary", "section-warnings"].includes(node.id);
    put(top, nodes.filter(isTop));
    const table = validations(one);
    put(place, [...(table ? [table] : []), ...nodes.filter((node) => !isTop(node))]);
  } else {
    put(top, []);
    put(place, runs.length > 1 ? compared(runs).map((section) => sectionNode(section, byId(`section-${section.id}`))) : []);
  }
}

/** Puts nodes into a place, where they aren't there already, so that focus and selections stay. */
function put(place, nodes) {
  const now = [...place.children];
  if (nodes.length === now.length && nodes.every((node, i) => node === now[i])) return;
  place.replaceChildren(...nodes);
}

const columnsOf = (run) => run.panels.filter((panel) => panel.key.startsWith("valid/") && !panel.key.includes("/time/")).map((panel) => [panel.key.slice(6), panel]);

/** Shows the validations of a run as a table; the last hundred of many. */
function validations(run) {
  const table = run.tables.valid, columns = columnsOf(run);
  if (!table?.n.length || !columns.length) return null;
  const from = Math.max(0, table.n.length - 100);
  const key = JSON.stringify([run.id, table.n.length, table.size, columns.map(([name]) => name)]);
  const before = byId("section-validations");
  if (before?.dataset.key === key) return before;
  const value = (name, panel, i) => {
    const x = table.columns[name]?.mean[i], gap = table.columns[name]?.gaps.has(i);
    const isBest = panel.best && panel.best.step === table.step[i] && table.size === 1;
    return {text: gap && x === null ? "not finite" : shown(x, 5), small: isBest ? panel.best.word : "", edge: isBest};
  };
  const rows = table.step.slice(from).map((step, i) => [step.toLocaleString("en"), ...columns.map(([name, panel]) => value(name, panel, from + i))]);
  const note = from ? `the last 100 of ${table.n.length.toLocaleString("en")}` : table.size > 1 ? `each row the mean of ${table.size}` : "";
  const node = sectionNode({id: "validations", title: "Validations", note, folded: true, blocks: [{kind: "table", heads: ["step", ...columns.map(([name]) => name)], rows: rows.reverse()}]}, before);
  node.dataset.key = key;
  return node;
}

/** Returns the sections that compare runs: what they came to, and how their configurations differ. */
function compared(runs) {
  const columns = new Map(runs.flatMap((run) => columnsOf(run)));
  const facts = [
    ["state", (run) => run.brief.state], ["step", (run) => run.brief.step.toLocaleString("en")],
    ["training loss", (run) => shown(run.brief.loss)],
    ...[...columns].map(([name, panel]) => [`${panel.best?.word ?? "last"} ${name}`, (run) => {
      const best = run.best(`valid/${name}`), last = run.tables.valid?.columns[name]?.mean.at(-1);
      return best ? {text: shown(best.value), small: `step ${best.step.toLocaleString("en")}`} : shown(last);
    }]),
    ["time", (run) => time(run.tables.train?.seconds.at(-1) ?? 0)],
  ];
  const heads = ["", ...runs.map((run) => run.name)];
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].filter((key) => new Set(runs.map((run) => run.config[key])).size > 1);
  const table = (rows) => ({kind: "table", heads, rows});
  const differ = keys.length ? table(keys.map((key) => [key, ...runs.map((run) => run.config[key] ?? "–")])) : {kind: "lines", lines: ["Their configurations are the same."]};
  return [
    {id: "compared", title: "Compared", note: "", blocks: [table(facts.map(([name, of]) => [name, ...runs.map(of)]))]},
    {id: "differences", title: "What differs", note: "in their configurations", blocks: [differ]},
  ];
}

// ------------------------------------------------------------------------------------------------------------ what changes

/** Shows a range, or all; `again` where the same range has new points, so that the ones that it has stay until then. */
async function zoomTo(range, again = false) {
  state.zoom = range;
  if (!again) {
    for (const run of state.shown.values()) run.near = null;
    page();
  }
  if (!range) return;
  const axis = state.axis;
  await Promise.all([...state.shown.values()].map(async (run) => {
    try {
      const found = await source.zoom(run.id, axis, range);
      if (found && state.zoom === range && state.axis === axis) run.near = {train: merged(null, found.train), valid: merged(null, found.valid)};
    } catch (error) {
      tellConnection(error);
    }
  }));
  if (state.zoom === range) page();
}

function tellConnection(error) {
  const node = byId("connection");
  failures = error ? failures + 1 : 0;
  node.hidden = !error;
  if (error) node.textContent = `Nothing new comes: ${error.message}. It is asked again.`;
}

/** Asks for what is new, one look at a time. */
function look() {
  wanted = true;
  looking ??= (async () => {
    while (wanted) {
      wanted = false;
      try {
        await lookOnce();
        if (failures) tellConnection(null);
      } catch (error) {
        tellConnection(error);
      }
    }
    looking = null;
    clearTimeout(look.timer);
    if (isLive && !document.hidden) look.timer = setTimeout(look, EVERY * Math.min(8, 2 ** failures));
  })();
}

async function lookOnce() {
  const found = await source.runs();
  state.runs = found.runs;
  if (isLive) byId("root").textContent = found.root;
  if (!state.shown.size) {
    const named = inAddress(); // a run that begins now may not be there yet
    const ids = named.length ? named.filter((id) => state.runs.some((run) => run.id === id)) : state.runs.slice(0, 1).map((run) => run.id);
    if (ids.length) return select(ids, false);
    state.awaited = named;
  }
  const listed = new Map(state.runs.map((run) => [run.id, run]));
  let grew = false;
  await Promise.all([...state.shown.values()].map(async (run) => {
    const brief = listed.get(run.id);
    if (!brief) return;
    const same = run.brief && run.whole >= 1 && ["updated", "state", "step"].every((name) => run.brief[name] === brief[name]);
    if (same && (run.kind === "stream" || run.settled)) return;
    const before = run.cursor;
    const view = await source.run(run.id, run.cursor);
    if (state.shown.get(run.id) !== run) return;
    run.take(view);
    grew ||= Boolean(view.train?.n.length || view.valid?.n.length);
    run.settled = same && run.cursor === before;
    if (run.whole < 1) wanted = true;
  }));
  list();
  page();
  if (state.zoom && grew) await zoomTo(state.zoom, true);
}

for (const radio of document.querySelectorAll("[name=axis]"))
  radio.addEventListener("change", () => {
    state.axis = radio.value;
    state.zoom = null;
    for (const run of state.shown.values()) run.near = null;
    page(true);
  });
const tellSmoothing = () => {
  state.smoothing = Number(byId("smoothing").value) / 100;
  const share = (state.smoothing ** 2) / 2;
  byId("smoothed").textContent = share ? `${shown(100 * share, 2)} %` : "off";
};
byId("smoothing").addEventListener("input", () => (tellSmoothing(), page()));
byId("log").addEventListener("change", () => ((state.log = byId("log").checked), page(true)));
byId("unzoom").addEventListener("click", () => (zoomTo(null), byId("smoothing").focus()));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("search").addEventListener("input", () => ((state.listed = LISTED), list()));
byId("more").addEventListener("click", () => ((state.listed += LISTED), list()));
addEventListener("popstate", () => {
  const ids = inAddress().filter((id) => state.runs.some((run) => run.id === id));
  if (ids.length) select(ids, false);
});
addEventListener("beforeprint", () => charts.forEach((chart) => chart.draw()));
document.addEventListener("visibilitychange", () => document.hidden || look());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => page(true));
if (isLive) setInterval(ages, 1000);
if (isLive && matchMedia("(max-width: 760px)").matches) byId("list").querySelector("details").open = false;
byId("list").hidden = !isLive;
document.body.classList.toggle("single", !isLive);
tellSmoothing();
look();
