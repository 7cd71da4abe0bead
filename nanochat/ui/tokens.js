/* A reply as its tokens, shaded and underlined by how unlikely each was. The one in focus tells
what else it could have been. One of them is a tab stop; the arrow keys reach the others. */

import { el } from "./dom.js";

const LEGEND = "The darker a token and the thicker its line, the less likely it was. Choose one.";
const LIMITS = [0.9, 0.5, 0.1, 0.01]; // the probabilities below which a token looks less likely
const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity, " ": 0 };

const visible = (token) => token.replaceAll("\n", "↵");
const spoken = (token) => token.trim() || (token.includes("\n") ? "line break" : "space");

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share < 0.1 ? "under 0.1 %" : `${share.toFixed(share < 9.95 ? 1 : 0)} %`;
}

export class TokensView {
  /* `tokens` grows: entries of the API's logprobs, and calls of the tool. */
  constructor(tokens) {
    this.tokens = tokens;
    this.numShown = 0;
    this.buttons = [];
    const about = { role: "toolbar", ariaLabel: "Tokens of the answer" };
    this.row = el("div", { className: "tokens", onkeydown: (event) => this.move(event), ...about });
    this.choices = el("p", { className: "choices" }, LEGEND);
    this.element = el("div", {}, this.row, this.choices);
  }

  update() {
    const fresh = this.tokens.slice(this.numShown);
    this.numShown += fresh.length;
    for (const entry of fresh) {
      const { token, expression, result } = entry;
      if (token === undefined) this.row.append(el("code", {}, `${expression} = ${result ?? "?"}`));
      else this.row.append(this.build(entry), token.includes("\n") ? el("br") : "");
    }
  }

  build(entry) {
    // No <button>, which is a block and would break lines within words.
    const button = el("span", { role: "button", className: "token" }, visible(entry.token));
    const doubt = LIMITS.filter((limit) => Math.exp(entry.logprob) < limit).length;
    button.style.setProperty("--doubt", doubt);
    button.ariaLabel = `${spoken(entry.token)}, ${percent(entry.logprob)}`;
    button.tabIndex = this.buttons.length ? -1 : 0;
    button.onfocus = button.onclick = () => this.choose(button, entry);
    this.buttons.push(button);
    return button;
  }

  choose(button, entry) {
    for (const each of this.buttons) each.tabIndex = each === button ? 0 : -1;
    const others = entry.top_logprobs.filter(({ token }) => token !== entry.token);
    const all = [entry, ...others].sort((a, b) => b.logprob - a.logprob);
    const items = all.map(({ token, logprob }) => {
      const code = el("code", {}, visible(token));
      return el(token === entry.token ? "b" : "span", {}, code, ` ${percent(logprob)} `);
    });
    this.choices.role = "status"; // from now on: the legend alone is not worth an announcement
    this.choices.replaceChildren(...items);
  }

  move(event) {
    if (!(event.key in STEPS)) return;
    const wanted = this.buttons.indexOf(document.activeElement) + STEPS[event.key];
    this.buttons[Math.min(Math.max(wanted, 0), this.buttons.length - 1)].focus();
    event.preventDefault();
  }
}
