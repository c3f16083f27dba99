"use strict";
// Curves of every logged metric, in one group per kind of stage: search, smoothing, a logarithmic axis, spread over seeds.

const CYCLE = ["blue", "orange", "green", "pink", "amber", "sky", "violet", "brown", "grey"];

function movingAverage(values, width) {
  if (width < 2) return values;
  const half = Math.floor(width / 2);
  return values.map((value, i) => {
    if (value === null) return null;
    let sum = 0, count = 0;
    for (let j = Math.max(0, i - half); j <= Math.min(values.length - 1, i + half); j++) {
      if (values[j] !== null) { sum += values[j]; count += 1; }
    }
    return sum / count;
  });
}

// Mean and standard deviation over seeds, at every step.
function overSeeds(seeds) {
  return seeds[0].map((_, i) => {
    const values = seeds.map(seed => seed[i]).filter(value => value !== null);
    if (!values.length) return [null, null];
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const square = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    return [mean, values.length > 1 ? Math.sqrt(square / (values.length - 1)) : 0];
  });
}

class Curves {
  constructor(root, groups) {
    this.groups = groups;
    this.hidden = new Set();
    this.figures = [];
    this.search = element("input", { type: "search", id: "curve-search", placeholder: "kl, loss, grad…", oninput: () => this.filter() });
    this.smoothing = element("input", { type: "range", id: "curve-smoothing", min: 0, max: 25, value: 5, oninput: () => this.redraw() });
    this.width = element("output", { for: "curve-smoothing" });
    this.log = element("input", { type: "checkbox", id: "curve-log", onchange: () => this.redraw() });
    this.status = element("span", { role: "status" });
    root.append(
      element("div", { class: "controls" },
        element("label", { for: "curve-search" }, "Search"), this.search,
        element("label", { for: "curve-smoothing" }, "Smoothing"), this.smoothing, this.width,
        element("label", {}, this.log, "logarithmic"), this.status),
      element("p", { class: "note" }, "Strong: moving average over the share of the run that the slider gives; faint: every step. " +
        "With several seeds: the mean over seeds with a band of one standard deviation. Dotted: held-out data. " +
        "Drag across a chart to zoom in; a double click shows everything."));
    groups.forEach((group, place) => root.append(this.group(group, place)));
    this.filter();
    this.redraw();
  }

  group(group, place) {
    const several = group.stages.length > 1;
    const legend = element("div", { class: "legend", role: "group", "aria-label": `${group.title}: stages` });
    group.stages.forEach((stage, i) => legend.append(element("label", {},
      several ? element("input", { type: "checkbox", checked: true, onchange: event => {
        this.hidden[event.target.checked ? "delete" : "add"](`${place} ${i}`);
        this.redraw();
      } }) : "", element("i", { style: `background: var(--${this.colour(group, i)})` }), stage)));
    const notes = [group.caption, group.every > 1 ? `Points are means of up to ${group.every} steps.` : ""].filter(Boolean);
    const key = element("div", { class: "charts" }), rest = element("div", { class: "charts" });
    const more = element("details", {}, element("summary", {}), rest);
    const section = element("section", { class: "curves" }, element("h3", {}, group.title), legend,
      ...(notes.length ? [element("p", { class: "note" }, notes.join(" "))] : []), key, more);
    for (const chart of group.charts) {
      const unit = chart.unit ? element("small", {}, ` ${chart.unit}`) : "";
      const host = element("figure", {}, element("figcaption", {}, chart.title, unit));
      (chart.key ? key : rest).append(host);
      const figure = { host, section, more, group, place, chart, text: [chart.title, ...chart.columns].join(" ").toLowerCase() };
      this.figures.push(figure);
      whenSeen(host, () => { figure.drawn = new Chart(host, this.spec(figure)); });
    }
    return section;
  }

  colour(group, stage) {
    return group.stages.length > 1 ? CYCLE[stage % CYCLE.length] : group.colour;
  }

  spec({ group, place, chart }) {
    const marks = [], names = new Set(chart.lines.map(line => line.name)), several = group.stages.length > 1;
    for (const line of chart.lines) {
      if (this.hidden.has(`${place} ${line.stage}`)) continue;
      const colour = !several && line.colour ? line.colour : this.colour(group, line.stage);
      const width = line.heldOut ? 1 : Math.round(line.x.length * this.smoothing.value / 100);
      const smoothed = overSeeds(line.y.map(values => movingAverage(values, width)));
      const mean = smoothed.map(([value]) => value), spread = smoothed.map(([, deviation]) => deviation);
      const label = [group.stages[line.stage], line.name].filter(Boolean).join(", ");
      const same = { label, colour, x: line.x };
      if (line.y.length > 1) {
        const edge = sign => mean.map((value, i) => value === null ? null : value + sign * spread[i]);
        marks.push({ ...same, kind: "band", y: mean, low: edge(-1), high: edge(1) });
      } else if (width > 1) marks.push({ ...same, kind: "line", faint: true, y: line.y[0] });
      const order = [...names].indexOf(line.name);
      const dashed = line.heldOut ? "dots" : order > 0 || line.stage >= CYCLE.length;
      marks.push({ ...same, kind: "line", y: mean, dashed, spread: line.y.length > 1 ? spread : null,
                   name: names.size > 1 && !several ? line.name : "" });
      if (line.heldOut) marks.push({ ...same, kind: "points", small: true, faint: true, y: mean });
    }
    return { title: `${group.title}: ${chart.title}`, marks, levels: chart.levels, height: 220, shared: true,
             x: { label: group.step }, y: { scale: this.log.checked ? "log" : "linear" } };
  }

  redraw() {
    this.width.textContent = `${this.smoothing.value} %`;
    this.figures.forEach(figure => figure.drawn?.show(this.spec(figure)));
  }

  // All metrics that a search finds are shown; without one, those that are not the key figures of a kind are folded.
  filter() {
    const query = this.search.value.trim().toLowerCase();
    for (const figure of this.figures) figure.host.hidden = !figure.text.includes(query);
    for (const section of new Set(this.figures.map(figure => figure.section))) {
      const own = this.figures.filter(figure => figure.section === section), shown = own.filter(figure => !figure.host.hidden);
      const folded = shown.filter(figure => !figure.chart.key), more = own[0].more;
      section.hidden = !shown.length;
      more.hidden = !folded.length;
      more.open = Boolean(query) || own.every(figure => !figure.chart.key);
      more.querySelector("summary").textContent = `${folded.length} more metric${folded.length === 1 ? "" : "s"}`;
    }
    const count = this.figures.filter(figure => !figure.host.hidden).length;
    this.status.textContent = query ? `${count} of ${this.figures.length} metrics` : `${this.figures.length} metrics`;
  }
}

const curvesRoot = document.getElementById("curves-view");
if (curvesRoot) new Curves(curvesRoot, report.curves);
