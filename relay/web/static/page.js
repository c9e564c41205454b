// The page's own script: times of the reader's zone, charts, and news every few seconds while somebody looks.
// What comes from the relay is put into the page as it was rendered there, or as text; nothing is evaluated.
"use strict";

const EVERY_MS = 5000;
const SLOWEST_MS = 60000;

document.documentElement.classList.remove("no-script");

// Times

const two = (number) => String(number).padStart(2, "0");

function localText(moment) {
  const day = `${moment.getFullYear()}-${two(moment.getMonth() + 1)}-${two(moment.getDate())}`;
  return `${day} ${clock(moment)}`;
}

function clock(moment) {
  return `${two(moment.getHours())}:${two(moment.getMinutes())}:${two(moment.getSeconds())}`;
}

function zoneName() {
  const parts = new Intl.DateTimeFormat("en", { timeZoneName: "short" }).formatToParts(new Date());
  return parts.find((part) => part.type === "timeZoneName").value;
}

function localTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const moment = new Date(time.dateTime);
    if (!time.title) time.title = time.textContent.trim().replace(/\s+/g, " ");
    time.textContent = localText(moment);
  }
  for (const zone of root.querySelectorAll("[data-zone]")) zone.textContent = zoneName();
}

// Charts: bars on top of each other, one colour for each name

const charts = new Map(); // by the id of the figure

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function stacked(data) {
  const sums = data.x.map(() => 0);
  const layers = data.series.map((series) =>
    series.values.map((value, at) => (sums[at] += value ?? 0)),
  );
  return [data.x, ...layers.reverse()]; // the highest is drawn first, so that each covers what is below it
}

function options(data, width, height) {
  const grid = { stroke: colour("--line"), width: 1 };
  const axis = { stroke: colour("--soft"), font: "12px system-ui, sans-serif", grid, ticks: { show: false } };
  const last = data.x[data.x.length - 1] + data.step;
  return {
    width,
    height,
    padding: [8, 18, 0, 0],
    legend: { show: false },
    cursor: { y: false, points: { show: false }, drag: { x: false, y: false } },
    scales: {
      x: { range: () => [data.x[0], last] },
      y: { range: (_, low, high) => [0, Math.max(high * 1.05, 4)] },
    },
    axes: [
      { ...axis, grid: { show: false }, values: axisTimes, space: 70, size: 30 },
      { ...axis, size: 46, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6, 1e7] },
    ],
    series: [
      {},
      ...[...data.series].reverse().map((series) => ({
        fill: colour(`--${series.colour}`),
        width: 0,
        points: { show: false },
        paths: uPlot.paths.bars({ size: [0.82, 60, 1], align: 1 }),
      })),
    ],
    hooks: { setCursor: [tip] },
  };
}

function axisTimes(plot, splits, _axis, _space, step) {
  return splits.map((split) => {
    const moment = new Date(split * 1000);
    const midnight = moment.getHours() === 0 && moment.getMinutes() === 0;
    if (step >= 86400 || midnight) return `${moment.getDate()} ${moment.toLocaleString("en", { month: "short" })}`;
    return `${two(moment.getHours())}:${two(moment.getMinutes())}`;
  });
}

function line(text, className, value) {
  const row = document.createElement("p");
  if (className) row.append(Object.assign(document.createElement("i"), { className }));
  row.append(text);
  if (value !== undefined) row.append(Object.assign(document.createElement("b"), { textContent: value }));
  return row;
}

function tip(plot) {
  const { figure, data, box } = plot.relay;
  const at = plot.cursor.left < 0 ? null : Math.floor((plot.posToVal(plot.cursor.left, "x") - data.x[0]) / data.step);
  if (at === null || at < 0 || at >= data.x.length) {
    box.hidden = true;
    return;
  }
  const [begin, end] = [0, data.step].map((after) => localText(new Date((data.x[at] + after) * 1000)).slice(0, -3));
  const rows = data.series
    .map((series) => [series, series.values[at]])
    .filter(([, value]) => value)
    .map(([series, value]) => line(series.label, `c-${series.colour}`, value.toLocaleString("en")));
  const unknown = data.series.every((series) => series.values[at] === null);
  if (rows.length === 0) rows.push(line(unknown ? "not running, or not known" : "nothing"));
  // Six hours or a day of UTC: where they begin and end the axis, in the reader's zone, does not show.
  box.replaceChildren(line(data.step > 3600 ? `${begin} to ${end}` : begin), ...rows);
  box.hidden = false;
  const room = figure.clientWidth - box.offsetWidth;
  const left = plot.cursor.left + 60;
  box.style.left = `${Math.max(0, Math.min(left > room ? left - box.offsetWidth - 24 : left, room))}px`;
  box.style.top = "8px";
}

function draw(figure) {
  const plot = figure.querySelector(".plot");
  const data = JSON.parse(figure.dataset.chart);
  const known = charts.get(figure.id);
  if (known) {
    known.observer.disconnect();
    known.chart.destroy();
    known.box.remove();
  }
  if (data.x.length === 0 || typeof uPlot === "undefined") return;
  const chart = new uPlot(options(data, plot.clientWidth, plot.clientHeight), stacked(data), plot);
  const box = document.createElement("div");
  box.className = "tip";
  box.hidden = true;
  plot.append(box);
  chart.relay = { figure, data, box };
  const observer = new ResizeObserver(() => {
    if (plot.clientWidth) chart.setSize({ width: plot.clientWidth, height: plot.clientHeight });
  });
  observer.observe(plot);
  charts.set(figure.id, { chart, box, observer });
}

function update(figure) {
  const known = charts.get(figure.id);
  const data = JSON.parse(figure.dataset.chart);
  const same = known && JSON.stringify(names(known.chart.relay.data)) === JSON.stringify(names(data));
  if (!same) {
    draw(figure);
    return;
  }
  Object.assign(known.chart.relay.data, data); // the scales look there
  known.chart.relay.figure = figure;
  known.chart.setData(stacked(data));
}

function names(data) {
  return [data.step, ...data.series.map((series) => series.label)];
}

function drawAll() {
  for (const figure of document.querySelectorAll("figure[data-chart]")) draw(figure);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// News

const page = document.querySelector("[data-live]");
const said = document.querySelector(".freshness span");
const pause = document.querySelector(".freshness button");
const shown = new Map(); // by the id of a part: its HTML as it came
let timer = 0;
let failures = 0;
let news = "";
let updated = new Date();

function busy(part) {
  const selection = getSelection();
  const selected = selection && !selection.isCollapsed && part.contains(selection.anchorNode);
  return selected || part.contains(document.activeElement);
}

function exchange(part, fresh) {
  const html = fresh.innerHTML;
  if (shown.get(part.id) === html || busy(part)) return;
  shown.set(part.id, html);
  localTimes(fresh);
  const before = part.querySelector("figure[data-chart]");
  const after = fresh.querySelector("figure[data-chart]");
  if (before && after) {
    after.querySelector(".plot").replaceWith(before.querySelector(".plot"));
    const opened = before.querySelector("details");
    if (opened && opened.open) after.querySelector("details").open = true;
  }
  part.replaceChildren(...fresh.childNodes);
  if (after) update(after);
}

async function look() {
  clearTimeout(timer);
  if (document.hidden || pause.getAttribute("aria-pressed") === "true") return;
  try {
    const answer = await fetch(page.dataset.live, { cache: "no-cache", signal: AbortSignal.timeout(10000) });
    if (!answer.ok) throw new Error(String(answer.status));
    const body = await answer.text();
    if (body !== news) {
      news = body;
      const parsed = new DOMParser().parseFromString(body, "text/html"); // an inert document: nothing in it runs
      for (const fresh of parsed.querySelectorAll("[data-part]")) {
        const part = document.getElementById(fresh.id);
        if (part) exchange(part, document.importNode(fresh, true));
      }
    }
    failures = 0;
    updated = new Date();
    fresh(`Updated ${clock(updated)}`, false);
  } catch {
    failures += 1;
    fresh(`No answer from the relay since ${clock(updated)}`, true);
  }
  timer = setTimeout(look, Math.min(EVERY_MS * 2 ** failures, SLOWEST_MS));
}

function fresh(text, stale) {
  said.textContent = text;
  said.parentElement.classList.toggle("stale", stale);
}

// An address that is passed on says only what was asked for, and in which zone

for (const form of document.querySelectorAll("form.search")) {
  form.addEventListener("submit", () => {
    const timed = form.elements.since.value || form.elements.until.value;
    for (const field of form.querySelectorAll("input")) field.disabled = !field.value.trim();
    form.elements.tz.disabled = !timed;
    form.elements.tz.value = Intl.DateTimeFormat().resolvedOptions().timeZone || "UTC";
    setTimeout(() => form.querySelectorAll("input").forEach((field) => (field.disabled = false)));
  });
}

localTimes(document);
drawAll();
if (page) {
  for (const part of document.querySelectorAll("[data-part]")) shown.set(part.id, null);
  pause.hidden = false;
  pause.addEventListener("click", () => {
    const paused = pause.getAttribute("aria-pressed") !== "true";
    pause.setAttribute("aria-pressed", String(paused));
    if (paused) fresh(`Paused at ${clock(new Date())}`, false);
    look();
  });
  document.addEventListener("visibilitychange", look);
  fresh(`Updated ${clock(updated)}`, false);
  timer = setTimeout(look, EVERY_MS);
}
