"use strict";
// Charts of the report. uPlot has the axes, the zoom and the cursor; marks and their labels are drawn here.

const report = JSON.parse(document.getElementById("report-data").textContent);
const darkScheme = matchMedia("(prefers-color-scheme: dark)");
const live = element("div", { class: "unseen", "aria-live": "polite" });
document.body.append(live);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

const colourOf = name => report.palette[name][darkScheme.matches ? 1 : 0];
const roleOf = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  let text;
  if (size >= 1e6 || (size > 0 && size < 1e-3)) text = value.toExponential(2);
  else if (size >= 1000) text = Math.round(value).toLocaleString("en");
  else text = String(Number(value.toPrecision(3)));
  return text.replaceAll("-", "−");
}

// ---- scales ---------------------------------------------------------------------------------------------------------

const ROOT_TICKS = [0, 0.1, 0.5, 1, 2, 4, 6, 9, 12, 16, 20, 25, 30, 36, 49, 64, 81, 100, 150, 200, 300, 400, 600, 1000];
const SCALES = {
  linear: { time: false },
  root: {
    time: false,
    distr: 100,
    fwd: value => Math.sign(value) * Math.sqrt(Math.abs(value)),
    bwd: value => Math.sign(value) * value * value,
  },
  log: { time: false, distr: 3 },
};

function rootSplits(plot, axis, min, max) {
  const kept = [];
  for (const tick of ROOT_TICKS) {
    const position = plot.valToPos(tick, "x");
    if (tick >= min && tick <= max && (!kept.length || position - kept.at(-1)[1] > 34)) kept.push([tick, position]);
  }
  return kept.map(([tick]) => tick);
}

function extent(marks, axis, sides, from = -Infinity, to = Infinity) {
  let low = Infinity, high = -Infinity;
  for (const mark of marks) {
    for (const side of [axis, ...sides]) {
      (mark[side] ?? []).forEach((value, i) => {
        if (value === null || mark.x[i] < from || mark.x[i] > to) return;
        low = Math.min(low, value);
        high = Math.max(high, value);
      });
    }
  }
  return low > high ? [0, 1] : [low, high];
}

function padded([low, high], share) {
  const pad = (high - low || Math.abs(high) || 1) * share;
  return [low - pad, high + pad];
}

// ---- a chart --------------------------------------------------------------------------------------------------------

const drawn = new Set();
darkScheme.addEventListener("change", () => drawn.forEach(chart => chart.plot.redraw()));

// spec: {title, x: {label, scale}, y: {label, scale}, marks, height, shared}. `shared` shows all marks at the cursor's x.
class Chart {
  constructor(host, spec) {
    this.host = host;
    this.tip = element("div", { class: "tip", hidden: true });
    this.frame = element("div", {
      class: "plot", tabindex: 0, role: "img",
      "aria-label": `${spec.title}. Chart; the arrow keys read values, plus and minus zoom, 0 shows everything.`,
      onkeydown: event => this.key(event),
    });
    this.details = element("details", { ontoggle: () => this.details.open && this.fillTable() },
      element("summary", {}, "Values as a table"));
    host.insertBefore(this.frame, host.querySelector("figcaption"));
    host.append(this.details);
    this.show(spec);
    new ResizeObserver(() => this.plot.setSize({ width: this.frame.clientWidth, height: this.height })).observe(this.frame);
    drawn.add(this);
  }

  show(spec) {
    const zoomed = this.window;
    this.plot?.destroy();
    this.spec = spec;
    this.height = spec.height ?? 330;
    this.xs = [...new Set(spec.marks.flatMap(mark => mark.x))].sort((a, b) => a - b);
    const { fwd = x => x, bwd = x => x } = SCALES[spec.x.scale ?? "linear"];
    this.whole = padded(extent(spec.marks, "x", ["left", "right"]).map(fwd), 0.03).map(bwd);
    const axis = role => ({
      stroke: () => roleOf("muted"), grid: { stroke: () => roleOf("rule"), width: 1 },
      ticks: { stroke: () => roleOf("rule"), width: 1 }, font: "12px system-ui, sans-serif",
      labelFont: "12px system-ui, sans-serif", ...role,
    });
    const values = (plot, splits) => splits.map(split => split === null ? "" : number(split));
    const options = {
      width: this.frame.clientWidth, height: this.height, legend: { show: false },
      cursor: { points: { show: false }, y: false, drag: { x: true, y: false } },
      scales: {
        x: { ...SCALES[spec.x.scale ?? "linear"], range: (plot, low, high) => this.xRange(low, high) },
        y: { ...SCALES[spec.y.scale ?? "linear"], range: () => this.yRange() },
      },
      series: [{}, { paths: () => null, points: { show: false } }],
      axes: [
        axis({ label: spec.x.label, labelSize: 18, size: 32, values, space: 55,
               ...(spec.x.scale === "root" ? { splits: rootSplits, filter: (plot, splits) => splits } : {}) }),
        axis({ size: 54, values, ...(spec.y.label ? { label: spec.y.label, labelSize: 18 } : {}) }),
      ],
      hooks: {
        draw: [plot => this.draw(plot)],
        setCursor: [plot => this.hover(plot)],
      },
    };
    this.plot = new uPlot(options, [this.xs, this.xs.map(() => 1)], this.frame);
    this.plot.root.append(this.tip);
    if (zoomed) this.zoom(...zoomed);
    if (this.details.open) this.fillTable();
  }

  // uPlot asks for the range of all data, or for the range that was dragged.
  xRange(low, high) {
    const all = low === null || low === undefined || (low <= this.xs[0] && high >= this.xs.at(-1));
    this.window = all ? null : [low, high];
    return this.window ?? this.whole;
  }

  yRange() {
    const [from, to] = this.window ?? this.whole;
    const large = this.spec.marks.filter(mark => mark.kind !== "dots");  // answers may lie outside of a chart of means
    const [low, high] = extent(large.length ? large : this.spec.marks, "y", ["low", "high"], from, to);
    if (this.spec.y.scale === "log") return low > 0 ? [low * 0.9, high * 1.1] : [high * 1e-4 || 1e-4, high * 1.1 || 1];
    return padded([low, high], 0.06);
  }

  zoom(min, max) {
    this.plot.setScale("x", { min: Math.max(min, this.whole[0]), max: Math.min(max, this.whole[1]) });
  }

  // ---- keyboard and pointer ----

  key(event) {
    const plot = this.plot, { min, max } = plot.scales.x;
    const at = this.at ?? this.xs.findIndex(x => x >= min);
    const step = (event.shiftKey ? 10 : 1) * { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) {
      this.at = Math.min(this.xs.length - 1, Math.max(0, at + step));
      plot.setCursor({ left: plot.valToPos(this.xs[this.at], "x"), top: plot.over.clientHeight / 2 });
      live.textContent = this.tip.textContent;
    } else if (event.key === "+" || event.key === "=" || event.key === "-") {
      const middle = this.at === undefined ? (min + max) / 2 : this.xs[this.at];
      const half = (max - min) / 2 * (event.key === "-" ? 2 : 0.5);
      this.zoom(middle - half, middle + half);
    } else if (event.key === "0" || event.key === "Escape") this.zoom(...this.whole);
    else return;
    event.preventDefault();
  }

  hover(plot) {
    const { left, top } = plot.cursor;
    this.tip.hidden = true;
    if (left === undefined || left < 0) return;
    const lines = this.spec.shared ? this.valuesAt(plot.posToVal(left, "x")) : this.nearest(plot, left, top);
    if (!lines.length) return;
    this.tip.replaceChildren(...lines.map(([text, colour]) => element("div", {},
      ...(colour ? [element("i", { style: `background: ${colourOf(colour)}` })] : []), text)));
    this.tip.hidden = false;
    const x = left + plot.over.offsetLeft, wide = this.tip.offsetWidth, room = plot.root.clientWidth;
    this.tip.style.left = `${Math.max(0, x + 14 + wide > room ? x - wide - 14 : x + 14)}px`;
    this.tip.style.top = `${Math.max(0, Math.min(top, this.height - this.tip.offsetHeight - 8))}px`;
  }

  valuesAt(x) {
    const found = [];
    let at = null;
    for (const mark of this.spec.marks) {
      if (mark.faint || mark.kind === "band") continue;
      let best = -1;
      mark.x.forEach((value, i) => {
        if (mark.y[i] !== null && (best < 0 || Math.abs(value - x) < Math.abs(mark.x[best] - x))) best = i;
      });
      if (best < 0) continue;
      if (at === null || Math.abs(mark.x[best] - x) < Math.abs(at - x)) at = mark.x[best];
      const spread = mark.spread ? ` ± ${number(mark.spread[best])}` : "";
      found.push([`${mark.label}: ${number(mark.y[best])}${spread}`, mark.colour]);
    }
    return found.length ? [[`${this.spec.x.label} ${number(at)}`, null], ...found] : [];
  }

  nearest(plot, left, top) {
    let best = null, distance = 40;
    for (const mark of this.spec.marks) {
      if (mark.kind === "band") continue;
      mark.x.forEach((x, i) => {
        const away = Math.hypot(plot.valToPos(x, "x") - left, plot.valToPos(mark.y[i], "y") - top);
        if (away < distance) [best, distance] = [[mark, i], away];
      });
    }
    if (!best) return [];
    const [mark, i] = best;
    const bounds = mark.low && mark.kind === "points" ? ` [${number(mark.low[i])}, ${number(mark.high[i])}]` : "";
    return [[mark.label, mark.colour], ...(mark.notes ? [[mark.notes[i], null]] : []),
            [`x ${number(mark.x[i])}, y ${number(mark.y[i])}${bounds}`, null]];
  }

  // ---- drawing ----

  draw(plot) {
    const { ctx, bbox } = plot, ratio = devicePixelRatio;
    const X = value => plot.valToPos(value, "x", true), Y = value => plot.valToPos(value, "y", true);
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.lineJoin = "round";
    for (const level of this.spec.levels ?? []) {
      stroke(ctx, [[bbox.left, Y(level)], [bbox.left + bbox.width, Y(level)]], roleOf("muted"), ratio, [4 * ratio, 4 * ratio]);
    }
    for (const mark of this.spec.marks) {
      const colour = colourOf(mark.colour);
      const points = mark.x.map((x, i) => mark.y[i] === null ? null : [X(x), Y(mark.y[i])]).filter(Boolean);
      if (mark.kind === "band") {
        const there = mark.x.map((x, i) => mark.low[i] === null ? null : i).filter(i => i !== null);
        const edge = [...there.map(i => [X(mark.x[i]), Y(mark.high[i])]), ...there.reverse().map(i => [X(mark.x[i]), Y(mark.low[i])])];
        fill(ctx, edge, colour, 0.17);
      } else if (mark.kind === "line") {
        ctx.globalAlpha = mark.faint ? 0.25 : 1;
        const dash = { true: [6, 4], dots: [2, 3] }[mark.dashed]?.map(length => length * ratio) ?? [];
        stroke(ctx, points, colour, (mark.faint ? 1 : 1.8) * ratio, dash);
        ctx.globalAlpha = 1;
      } else if (mark.kind === "steps") {
        const edge = mark.x.slice(0, -1).flatMap((x, i) => [[X(x), Y(mark.y[i])], [X(mark.x[i + 1]), Y(mark.y[i])]]);
        const base = Y(0);
        fill(ctx, [[edge[0][0], base], ...edge, [edge.at(-1)[0], base]], colour, 0.25);
        stroke(ctx, edge, colour, 1.5 * ratio);
      } else if (mark.kind === "dots") {
        points.forEach(point => disc(ctx, point, 2 * ratio, colour, 0.35));
      } else {
        mark.x.forEach((x, i) => {
          if (mark.low) stroke(ctx, [[X(x), Y(mark.low[i])], [X(x), Y(mark.high[i])]], colour, 1.5 * ratio);
          if (mark.left) stroke(ctx, [[X(mark.left[i]), Y(mark.y[i])], [X(mark.right[i]), Y(mark.y[i])]], colour, 1.5 * ratio);
        });
        points.forEach(point => disc(ctx, point, (mark.small ? 2.5 : 4.5) * ratio, colour, 1));
      }
    }
    ctx.restore();
    label(ctx, bbox, this.spec.marks, X, Y, ratio);
  }

  // ---- the same for readers who do not see it ----

  fillTable() {
    const rows = this.spec.shared ? this.summaries() : this.points();
    const [head, ...body] = rows.map((row, i) => element("tr", {}, ...row.map((cell, j) =>
      element(i === 0 || j === 0 ? "th" : "td", i === 0 ? { scope: "col" } : j === 0 ? { scope: "row" } : {}, cell))));
    const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
    this.details.querySelector(".scroll")?.remove();
    this.details.append(element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "values" }, table));
  }

  summaries() {
    const rows = this.spec.marks.filter(mark => !mark.faint && mark.kind !== "band").map(mark => {
      const values = mark.y.filter(value => value !== null);
      return [mark.label, values[0], values.at(-1), Math.min(...values), Math.max(...values)];
    });
    return [["", "first", "last", "lowest", "highest"], ...rows.map(([name, ...values]) => [name, ...values.map(number)])];
  }

  points() {
    const rows = this.spec.marks.filter(mark => mark.kind !== "band" && mark.kind !== "dots").flatMap(mark => mark.x.map((x, i) =>
      [`${mark.label}${mark.notes ? `, ${mark.notes[i]}` : ""}`, ...[x, mark.y[i], mark.low?.[i], mark.high?.[i]].map(number)]));
    return [["", "x", "y", "from", "to"], ...rows];
  }
}

// ---- marks ----------------------------------------------------------------------------------------------------------

function stroke(ctx, points, colour, width, dash = []) {
  ctx.strokeStyle = colour;
  ctx.lineWidth = width;
  ctx.setLineDash(dash);
  ctx.beginPath();
  points.forEach(([x, y], i) => i ? ctx.lineTo(x, y) : ctx.moveTo(x, y));
  ctx.stroke();
  ctx.setLineDash([]);
}

function fill(ctx, points, colour, alpha) {
  ctx.fillStyle = colour;
  ctx.globalAlpha = alpha;
  ctx.beginPath();
  points.forEach(([x, y], i) => i ? ctx.lineTo(x, y) : ctx.moveTo(x, y));
  ctx.fill();
  ctx.globalAlpha = 1;
}

function disc(ctx, [x, y], radius, colour, alpha) {
  ctx.fillStyle = colour;
  ctx.globalAlpha = alpha;
  ctx.beginPath();
  ctx.arc(x, y, radius, 0, 2 * Math.PI);
  ctx.fill();
  ctx.globalAlpha = 1;
}

// Labels stand beside the last points of their marks, where they cover no other label and the fewest points.
function label(ctx, bbox, marks, X, Y, ratio) {
  const named = marks.filter(mark => mark.name && mark.y.at(-1) !== null);
  const taken = marks.filter(mark => mark.kind === "points" || mark.kind === "line").flatMap(mark => {
    const points = mark.x.map((x, i) => [X(x), Y(mark.y[i])]);
    return mark.kind === "points" || points.length > 200 ? points : points.flatMap((point, i) => i ? between(points[i - 1], point) : [point]);
  });
  const boxes = [];
  ctx.font = `600 ${12 * ratio}px system-ui, sans-serif`;
  ctx.textBaseline = "middle";
  for (const mark of named) {
    const last = mark.x.length - 1 - (mark.kind === "steps" ? Math.ceil(mark.x.length / 3) : 0);
    const x = X(mark.x[last]), y = Y(mark.y[last]), wide = ctx.measureText(mark.name).width, high = 15 * ratio;
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    let best = null;
    for (const away of [9, 18, 30, 45, 65, 90]) {
      for (const angle of [0, 180, -35, 35, 215, 145, -90, 90, -60, 60, 240, 120]) {
        const turn = angle * Math.PI / 180, dx = Math.cos(turn), dy = Math.sin(turn);
        const left = x + away * ratio * dx - (dx > 0.1 ? 0 : dx < -0.1 ? wide : wide / 2);
        const box = { left, right: left + wide, top: y + away * ratio * dy - high / 2, bottom: y + away * ratio * dy + high / 2, away };
        const outside = box.left < bbox.left || box.right > bbox.left + bbox.width || box.top < bbox.top || box.bottom > bbox.top + bbox.height;
        const hits = boxes.filter(other => overlap(box, other)).length;
        const covered = taken.filter(([px, py]) => px > box.left - 3 && px < box.right + 3 && py > box.top - 3 && py < box.bottom + 3).length;
        const cost = 10_000 * outside + 3000 * hits + 20 * Math.min(covered, 100) + away;
        if (!best || cost < best.cost) best = { ...box, cost };
      }
    }
    boxes.push(best);
    const middle = (best.top + best.bottom) / 2;
    if (best.away > 20) {
      const end = Math.max(best.left, Math.min(x, best.right));
      ctx.globalAlpha = 0.6;
      stroke(ctx, [[x, y], [end, y < best.top ? best.top : y > best.bottom ? best.bottom : middle]], colourOf(mark.colour), ratio);
      ctx.globalAlpha = 1;
    }
    ctx.lineWidth = 4 * ratio;
    ctx.strokeStyle = roleOf("paper");
    ctx.fillStyle = colourOf(mark.colour);
    ctx.textAlign = "left";
    ctx.strokeText(mark.name, best.left, middle);
    ctx.fillText(mark.name, best.left, middle);
  }
}

function between([x, y], [toX, toY]) {
  return Array.from({ length: 12 }, (_, i) => [x + (toX - x) * (i + 1) / 12, y + (toY - y) * (i + 1) / 12]);
}

function overlap(one, other) {
  return one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom;
}

// ---- charts in the page ---------------------------------------------------------------------------------------------

// Charts are made when they are about to be seen.
const arriving = new IntersectionObserver(entries => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    arriving.unobserve(target);
    target.arrive();
  }
}, { rootMargin: "400px" });

function whenSeen(host, arrive) {
  host.arrive = arrive;
  arriving.observe(host);
}

document.querySelectorAll("figure.chart").forEach(host => {
  const title = host.dataset.title;
  if ("headed" in host.dataset) host.prepend(element("h3", {}, title));
  whenSeen(host, () => { host.chart = new Chart(host, { title, ...report.charts[host.dataset.chart] }); });
});
