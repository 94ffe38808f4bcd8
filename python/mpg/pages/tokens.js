"use strict";
// Tokens in the colour of the attribute that pushed them most, and what is to be said of each. No text becomes markup.

const FAINT = 0.1; // nats: a token pushed less than this stays as it is
const NUM_COLOURS = 8;
const MARKS = {
  accepted: "drafted, and accepted",
  residual: "drawn in place of a rejected draft",
  drawn: "drawn where no draft was rejected",
};

function make(tag, fields = {}, ...children) {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
}

function colour(element, names, name) {
  const place = names.indexOf(name);
  if (place >= 0) element.style.setProperty("--own", `var(--a${place % NUM_COLOURS})`);
  return element;
}

// The attribute whose weighted log-ratio is the largest, and that; [null, 0] where it is faint.
function strongest(logRatios, weights) {
  let best = [null, FAINT];
  for (const [name, ratio] of Object.entries(logRatios ?? {})) {
    const push = ratio * (weights[name] ?? 0);
    if (push > best[1]) best = [name, push];
  }
  return best[0] === null ? [null, 0] : best;
}

const tip = make("div", { id: "tip", role: "tooltip", hidden: true });
document.addEventListener("DOMContentLoaded", () => document.body.append(tip));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

function signed(number) {
  return Number.isFinite(number) ? (number < 0 ? "-" : "+") + Math.abs(number).toFixed(2) : String(number);
}

function showTip(span, token, weights, names) {
  tip.replaceChildren(make("code", { textContent: token.text ? JSON.stringify(token.text) : "no text of its own" }));
  const table = make("table");
  for (const [name, ratio] of Object.entries(token.log_ratios ?? {})) {
    const weight = weights[name] ?? 0;
    const swatch = colour(make("span", { className: "swatch" }), names, name);
    table.append(make("tr", {}, make("td", {}, swatch, ` ${name}`), make("td", { textContent: signed(ratio) }),
      make("td", { textContent: `× ${weight}` }), make("td", { textContent: `= ${signed(ratio * weight)}` })));
  }
  if (table.rows.length) {
    const heads = ["", "log-ratio", "weight", "push"].map((textContent) => make("th", { textContent }));
    table.prepend(make("tr", { className: "dim" }, ...heads));
    tip.append(table);
  }
  if (token.mark) tip.append(make("div", { className: "dim", textContent: MARKS[token.mark] }));
  if (token.rejected) {
    tip.append(make("div", { className: "dim", textContent: `${token.rejected} drafted thrown away in this round` }));
  }
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(left, 8) + scrollX}px`;
  tip.style.top = `${(above > 0 ? above : box.bottom + 6) + scrollY}px`;
}

// A text that grows token by token in an element. The arrow keys walk over its tokens.
class TokenText {
  constructor(element, names, weights) {
    Object.assign(this, { element, names, weights, count: 0, counts: {} });
    element.replaceChildren();
    element.onkeydown = (event) => {
      const next = { ArrowRight: "nextSibling", ArrowLeft: "previousSibling" }[event.key];
      let to = next && event.target[next];
      while (to && !to.classList.contains("token")) to = to[next];
      if (!to) return;
      event.preventDefault();
      event.target.tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
    };
  }

  // token: text, and where they are known log_ratios, mark and rejected
  add(token) {
    const [name, push] = strongest(token.log_ratios, this.weights);
    const span = make("span", { className: "token", textContent: token.text || "·", tabIndex: this.count ? -1 : 0 });
    span.setAttribute("aria-describedby", "tip");
    if (!token.text) span.classList.add("silent");
    if (token.mark) span.classList.add(token.mark);
    if (name !== null) {
      span.classList.add("pushed");
      span.dataset.attribute = name;
      span.style.setProperty("--strength", `${Math.round(16 + 44 * Math.min(push / 3, 1))}%`);
      colour(span, this.names, name);
    }
    span.onmouseenter = span.onfocus = span.onclick = () => showTip(span, token, this.weights, this.names);
    span.onmouseleave = span.onblur = () => { tip.hidden = true; };
    this.element.append(span);
    if (token.rejected) {
      this.element.append(make("span", { className: "rejected", textContent: `✗${token.rejected}` }));
    }
    this.count += 1;
    this.counts[name ?? ""] = (this.counts[name ?? ""] ?? 0) + 1;
  }

  // How many of the tokens each attribute of some weight pushed most: a bar, and the numbers.
  shares(element) {
    const bar = make("div", { className: "bar", ariaHidden: "true" });
    const legend = make("div", { className: "row" });
    for (const name of this.names.filter((one) => this.weights[one])) {
      const share = (this.counts[name] ?? 0) / Math.max(this.count, 1);
      const part = colour(make("i"), this.names, name);
      part.style.width = `${100 * share}%`;
      bar.append(part);
      legend.append(make("span", { className: "share" }, colour(make("span", { className: "swatch" }), this.names, name),
        `${name} ${Math.round(100 * share)} %`));
    }
    element.replaceChildren(bar, legend);
  }
}
