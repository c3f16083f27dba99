"use strict";
// Tokens of a sample, coloured by a quantity that its stage recorded.

const QUANTITIES = {
  kl: ["KL", "log-probability under the policy minus that under the reference, in nats"],
  reward: ["reward", "the score on the last token, less the KL penalty of each token if the reward includes it"],
  value: ["value", "the value function's estimate before the token"],
  advantage: ["advantage", "the factor of the token's policy gradient"],
};

const quantitiesOf = tokens => Object.keys(QUANTITIES).filter(name => name in tokens);
const LEAST = 1e-3; // smaller values, such as errors of rounding, do not get the full colour
const largestOf = (all, name) => Math.max(LEAST, ...all.flatMap(tokens => (tokens[name] ?? []).map(Math.abs)));
const signed = value => (value > 0 ? "+" : "") + number(value);
const readable = text => text.replaceAll("\n", "⏎\n") || "·"; // a part of a character has no text

// The tokens of one answer. The arrow keys move among them, and `read` gets the token that is pointed at.
function tokenView(tokens, name, largest, read) {
  const values = tokens[name], title = QUANTITIES[name][0];
  const view = element("p", { class: "text tokens", role: "listbox", "aria-label": `tokens, coloured by ${title}; the arrow keys move` });
  const told = i => read(`“${tokens.text[i].trim() || readable(tokens.text[i])}”, token ${i + 1} of ${values.length}: `
    + quantitiesOf(tokens).map(name => `${QUANTITIES[name][0]} ${signed(tokens[name][i])}`).join(" · "));
  view.append(...values.map((value, i) => element("span", {
    role: "option", class: ["below", "zero", "above"][Math.sign(value) + 1], tabindex: i ? -1 : 0, "aria-selected": "false",
    "aria-label": `${tokens.text[i].trim() || "blank"}: ${title} ${signed(value)}`, title: `${title} ${signed(value)}`,
    style: `--share: ${(Math.abs(value) / largest).toFixed(3)}`,
    onfocus: event => {
      view.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
      event.target.setAttribute("aria-selected", "true");
      told(i);
    },
    onpointerenter: () => told(i),
  }, readable(tokens.text[i]))));
  view.addEventListener("keydown", event => {
    const all = [...view.children], at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    const next = all[Math.min(all.length - 1, Math.max(0, to))];
    all[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return view;
}

// The scale is symmetric about 0, and the largest value of the answers shown is at its ends.
function tokenLegend(name, largest) {
  const end = number(largest), [title, meaning] = QUANTITIES[name];
  const note = `Orange with dots: below 0. Blue with a line: above 0. ${title}: ${meaning}.`;
  return element("div", { class: "scale" },
    element("span", {}, `−${end}`),
    element("i", { role: "img", "aria-label": `scale from −${end}, orange, over 0, without colour, to ${end}, blue` }),
    element("span", {}, `+${end}`), element("small", {}, note));
}

// The same values as a table, which is made when it is opened.
function tokenTable(tokens, label) {
  const names = quantitiesOf(tokens);
  const head = ["token", ...names.map(name => QUANTITIES[name][0])].map(text => element("th", { scope: "col" }, text));
  return element("details", { ontoggle: event => {
    if (!event.target.open || event.target.querySelector("table")) return;
    const rows = tokens.text.map((text, i) => element("tr", {}, element("th", { scope: "row" }, readable(text)),
      ...names.map(name => element("td", {}, number(tokens[name][i])))));
    event.target.append(element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `token values, ${label}` },
      element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows))));
  } }, element("summary", {}, "Values of all tokens"));
}
