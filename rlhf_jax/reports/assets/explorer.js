"use strict";
// Explorer of all samples: a virtual list to search and sort, two methods side by side, and one sample in full.

const SORTS = {
  order: ["order of the data", () => 0],
  score: ["reward score", (rows, i) => rows.score[i]],
  gold: ["gold score", (rows, i) => rows.gold[i]],
  change: ["change of score", (rows, i, explorer) => explorer.change(i)],
  kl: ["KL", (rows, i) => rows.kl[i]],
  length: ["length", (rows, i) => rows.length[i]],
};

const COLUMNS = ["writer", "step", "prompt", "text", "score", "gold", "kl", "length"];

class Explorer {
  constructor(root, samples) {
    this.samples = samples;
    this.rows = { prompts: [], ...Object.fromEntries(COLUMNS.map(name => [name, []])) };
    this.tokens = new Map();
    this.add(samples.rows);
    this.judged = this.rows.gold.some(value => value !== null);
    const options = samples.writers.map((writer, i) => [i, writer.label]);
    const [best, reference] = samples.compare ?? ["", ""];
    this.search = element("input", { type: "search", id: "sample-search", oninput: () => this.update() });
    this.of = select("sample-of", [["", "everything"], ...options], best, () => this.update());
    this.against = select("sample-against", [["", "nothing"], ...options], reference, () => this.update());
    const sorts = Object.entries(SORTS).filter(([name]) => name !== "gold" || this.judged);
    this.sort = select("sample-sort", sorts.map(([name, [title]]) => [name, title]), "order", () => this.update());
    this.descending = element("input", { type: "checkbox", onchange: () => this.update() });
    this.coloured = element("input", { type: "checkbox", id: "sample-tokens", onchange: () => {
      if (this.coloured.checked) this.of.value = this.against.value = "";
      this.update();
    } });
    this.quantity = select("token-quantity", [["", "nothing"], ...Object.entries(QUANTITIES).map(([name, [title]]) => [name, title])],
      "kl", () => { this.open(); this.quantity.focus(); });
    this.status = element("span", { role: "status" });
    const field = (title, control) => element("label", {}, title, control);
    this.items = element("div", { class: "items", role: "list", "aria-label": "samples" });
    this.view = element("div", { class: "list", tabindex: 0, role: "group",
      "aria-label": "Samples; the arrow keys move, Enter shows a sample in full",
      onscroll: () => this.render(), onkeydown: event => this.key(event) }, this.items);
    this.full = element("dialog", { "aria-label": "sample" });
    root.append(
      element("div", { class: "controls", onfocusin: () => this.load() },
        field("Search", this.search), field("Answers of", this.of), field("beside", this.against),
        field("Sort by", this.sort), element("label", {}, this.descending, "highest first"),
        samples.tokens ? element("label", {}, this.coloured, `with values of tokens (${number(samples.tokens)})`) : "", this.status),
      this.view, this.full);
    new ResizeObserver(() => this.render()).observe(this.view);
    this.update();
  }

  // ---- data ----

  add(columns) {
    const first = this.rows.prompts.length;
    for (const prompt of columns.prompts) this.rows.prompts.push(prompt);
    for (const name of COLUMNS) {
      const target = this.rows[name];
      for (const value of columns[name]) target.push(name === "prompt" ? value + first : value);
    }
    const before = this.length - columns.writer.length;
    for (const [i, tokens] of Object.entries(columns.tokens)) this.tokens.set(before + Number(i), tokens);
    this.lower = null;
  }

  // The samples that are not in the page are loaded when the explorer is used.
  load() {
    if (this.asked || !this.samples.more) return;
    this.asked = true;
    this.status.textContent = `Loading ${number(this.samples.more)} more samples…`;
    window.reportSamples = columns => { this.add(columns); this.samples.more = 0; this.update(); };
    document.body.append(element("script", { src: this.samples.file, onerror: () => {
      this.missing = true;
      this.update();
    } }));
  }

  get length() { return this.rows.writer.length; }

  score(i) { return this.rows.gold[i] ?? this.rows.score[i]; }

  change(i) {
    const other = this.partner.get(i);
    if (other === undefined) return null;
    const own = this.score(i), beside = this.score(other);
    return own === null || beside === null ? null : own - beside;
  }

  // The answer of the other method to the same prompt; where a prompt occurs several times, in the same place.
  pair(indices) {
    this.partner = new Map();
    if (this.against.value === "") return;
    const other = Number(this.against.value), { writer, prompt, prompts } = this.rows, answers = new Map(), used = new Map();
    for (let i = 0; i < this.length; i++) {
      if (writer[i] !== other) continue;
      const text = prompts[prompt[i]];
      answers.has(text) ? answers.get(text).push(i) : answers.set(text, [i]);
    }
    for (const i of indices) {
      const text = prompts[prompt[i]], key = `${writer[i]} ${text}`, count = used.get(key) ?? 0, found = answers.get(text);
      used.set(key, count + 1);
      if (found && found[count] !== undefined && found[count] !== i) this.partner.set(i, found[count]);
    }
  }

  update() {
    const query = this.search.value.trim().toLowerCase(), { writer, text, prompt, prompts } = this.rows;
    this.lower ??= text.map((value, i) => `${prompts[prompt[i]]}${value}`.toLowerCase());
    const of = this.of.value === "" ? null : Number(this.of.value), all = [];
    for (let i = 0; i < this.length; i++) {
      if ((of === null || writer[i] === of) && (!this.coloured.checked || this.tokens.has(i))) all.push(i);
    }
    this.pair(all);
    const compared = this.against.value !== "";
    this.shown = all.filter(i => (!query || this.lower[i].includes(query) || (this.partner.has(i) && this.lower[this.partner.get(i)].includes(query)))
      && (!compared || of === null || this.partner.has(i)));
    const key = SORTS[this.sort.value][1], sign = this.descending.checked ? -1 : 1;
    if (this.sort.value !== "order") {
      const keys = new Map(this.shown.map(i => [i, key(this.rows, i, this)]));
      this.shown.sort((a, b) => {
        const one = keys.get(a), other = keys.get(b);
        if (one === null || other === null) return (one === null) - (other === null);
        return sign * (one - other) || a - b;
      });
    } else if (sign < 0) this.shown.reverse();
    this.query = query;
    this.selected = 0;
    this.view.classList.toggle("compared", compared);
    this.view.scrollTop = 0;
    this.render(true);
    const lost = this.missing ? ` ${this.samples.file} is not beside this file: ${number(this.samples.more)} samples are missing.` : "";
    const more = this.samples.more && !this.missing ? ` (${number(this.samples.more)} more are loaded when this is used)` : "";
    this.status.textContent = `${number(this.shown.length)} of ${number(this.length)} samples${more}.${lost}`;
  }

  // ---- the list ----

  // All rows have one height, so that only those in view are elements.
  render(anew = false) {
    const row = parseFloat(getComputedStyle(this.view).getPropertyValue("--row")) * parseFloat(getComputedStyle(document.documentElement).fontSize);
    const first = Math.max(0, Math.floor(this.view.scrollTop / row) - 3);
    const last = Math.min(this.shown.length, Math.ceil((this.view.scrollTop + this.view.clientHeight) / row) + 3);
    if (!anew && this.drawn && this.drawn[0] === first && this.drawn[1] === last && this.drawn[2] === row) return;
    this.drawn = [first, last, row];
    this.items.style.height = `${this.shown.length * row}px`;
    const cards = [];
    for (let place = first; place < last; place++) cards.push(this.card(place, row));
    this.items.replaceChildren(...cards);
  }

  card(place, row) {
    const i = this.shown[place];
    const card = element("article", {
      role: "listitem", "aria-setsize": this.shown.length, "aria-posinset": place + 1,
      "aria-current": place === this.selected ? "true" : null, style: `top: ${place * row}px`, onclick: () => { if (getSelection().isCollapsed) { this.selected = place; this.open(); } },
    });
    card.append(...this.contents(i, false));
    return card;
  }

  contents(i, whole) {
    const { prompts, prompt, text } = this.rows, other = this.partner.get(i);
    const head = element("p", { class: "prompt" }, ...highlight(prompts[prompt[i]], this.query));
    if (other === undefined) return [head, this.answer(i, highlight(text[i], this.query), whole)];
    const [own, beside] = differences(text[i], text[other], this.query);
    const difference = this.change(i);
    const sign = difference === null ? "" : `change ${difference > 0 ? "+" : ""}${number(difference)}`;
    return [head, element("div", { class: "two" }, this.answer(i, own, whole, sign), this.answer(other, beside, whole))];
  }

  answer(i, words, whole, change = "") {
    const { writer, score, gold, kl, length, step } = this.rows, by = this.samples.writers[writer[i]];
    const numbers = [
      gold[i] === null ? "" : `gold ${number(gold[i])}`, score[i] === null ? "" : `reward ${number(score[i])}`,
      kl[i] === null ? "" : `KL ${number(kl[i])}`, length[i] === null ? "" : `${number(length[i])} tokens`,
      whole ? `${by.step} ${step[i]}` : "", !whole && this.tokens.has(i) ? "values of tokens" : "",
    ].filter(Boolean).join(" · ");
    return element("div", { class: "answer", style: `--colour: var(--${by.colour})` },
      element("header", {}, element("b", {}, by.label), element("span", {}, change ? `${change} · ${numbers}` : numbers)),
      ...(whole ? this.whole(i, words, by.label) : [element("p", { class: "text" }, ...words)]));
  }

  // The text of an answer in full, as coloured tokens where their values were recorded.
  whole(i, words, label) {
    const tokens = this.tokens.get(i), name = this.quantity.value;
    if (!tokens) return [element("p", { class: "text" }, ...words)];
    const read = text => { this.reading.textContent = text; };
    return [name in tokens ? tokenView(tokens, name, this.largest, read) : element("p", { class: "text" }, ...words),
      tokenTable(tokens, label)];
  }

  // Choice and legend of the colours of the open sample, and the place where a token's values are read.
  colours(i) {
    const found = [i, this.partner.get(i)].map(row => this.tokens.get(row)).filter(Boolean);
    if (!found.length) return [[], []];
    for (const option of this.quantity.options) option.disabled = option.value !== "" && !found.some(tokens => option.value in tokens);
    if (this.quantity.selectedOptions[0].disabled) this.quantity.value = "kl";
    const name = this.quantity.value;
    this.largest = largestOf(found, name);
    this.reading = element("p", { class: "reading" }, "Point at a token, or move among them with the arrow keys.");
    return [[element("div", { class: "controls" }, element("label", {}, "Colour tokens by", this.quantity),
      name ? tokenLegend(name, this.largest) : "")], name ? [this.reading] : []];
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.view.clientHeight / this.drawn[2]));
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key === "Enter" || event.key === " ") this.open();
    else if (event.key in steps) this.select(this.selected + steps[event.key]);
    else return;
    event.preventDefault();
  }

  select(place) {
    if (!this.shown.length) return;
    this.selected = Math.min(this.shown.length - 1, Math.max(0, place));
    const row = this.drawn[2], top = this.selected * row;
    if (top < this.view.scrollTop) this.view.scrollTop = top;
    else if (top + row > this.view.scrollTop + this.view.clientHeight) this.view.scrollTop = top + row - this.view.clientHeight;
    this.render(true);
    live.textContent = this.items.querySelector("[aria-current=true]")?.textContent ?? "";
  }

  open() {
    if (!this.shown.length) return;
    const go = by => { this.select(this.selected + by); this.open(); };
    const button = (title, action) => element("button", { type: "button", onclick: action }, title);
    const i = this.shown[this.selected], [above, below] = this.colours(i);
    this.full.replaceChildren(...above, ...this.contents(i, true), ...below, element("footer", {},
      button("Previous", () => go(-1)), button("Next", () => go(1)),
      element("span", {}, `${number(this.selected + 1)} of ${number(this.shown.length)}`),
      button("Close", () => this.full.close())));
    if (!this.full.open) this.full.showModal();
  }
}

function select(id, options, value, onchange) {
  return element("select", { id, onchange }, ...options.map(([name, title]) =>
    element("option", { value: name, selected: String(name) === String(value) }, title)));
}

// ---- words ----------------------------------------------------------------------------------------------------------

function highlight(text, query) {
  if (!query) return [text];
  const parts = [], lower = text.toLowerCase();
  let from = 0;
  for (let at = lower.indexOf(query); at >= 0; at = lower.indexOf(query, from)) {
    parts.push(text.slice(from, at), element("mark", {}, text.slice(at, at + query.length)));
    from = at + query.length;
  }
  return [...parts, text.slice(from)];
}

// Words of two texts; those that are not in their longest common subsequence are marked.
function differences(one, other, query) {
  const a = one.match(/\s*\S+/g) ?? [], b = other.match(/\s*\S+/g) ?? [];
  const word = text => text.trim();
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      table[i][j] = word(a[i]) === word(b[j]) ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
    }
  }
  const own = [], beside = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && word(a[i]) === word(b[j])) {
      own.push([a[i++], false]);
      beside.push([b[j++], false]);
    } else if (j >= b.length || (i < a.length && table[i + 1][j] >= table[i][j + 1])) own.push([a[i++], true]);
    else beside.push([b[j++], true]);
  }
  return [marked(own, "ins", query), marked(beside, "del", query)];
}

// Neighbouring words that differ share one element.
function marked(words, tag, query) {
  const runs = [];
  for (const [text, differs] of words) {
    if (runs.length && runs.at(-1)[1] === differs) runs.at(-1)[0] += text;
    else runs.push([text, differs]);
  }
  return runs.flatMap(([text, differs]) => differs ? [element(tag, {}, ...highlight(text, query))] : highlight(text, query));
}

const samplesRoot = document.getElementById("samples-view");
if (samplesRoot) window.explorer = new Explorer(samplesRoot, report.samples);
