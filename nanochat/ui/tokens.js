/* A reply as its tokens, shaded and underlined by how unlikely each was. The one in focus tells
what else it could have been. One of them is a tab stop; the arrow keys reach the others. */

import { el } from "./dom.js";

const LEGEND = "The darker a token and the thicker its line, the less likely it was. Choose one.";
const LIMITS = [0.9, 0.5, 0.1, 0.01]; // the probabilities from which a token looks less likely
const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share < 0.1 ? "under 0.1 %" : `${share.toFixed(share < 9.95 ? 1 : 0)} %`;
}

const visible = (token) => token.replaceAll("\n", "↵");
const spoken = (token) => token.trim() || (token.includes("\n") ? "line break" : "space");

export class TokensView {
  /* `tokens` grows: entries of the API's logprobs, and calls of the tool. */
  constructor(tokens) {
    this.tokens = tokens;
    this.buttons = [];
    const about = { role: "toolbar", ariaLabel: "Tokens of the answer" };
    this.row = el("div", { className: "tokens", ...about });
    this.row.onkeydown = (event) => this.move(event);
    this.choices = el("p", { className: "choices", role: "status" }, LEGEND);
    this.element = el("div", {}, this.row, this.choices);
    this.shown = 0;
  }

  update() {
    for (; this.shown < this.tokens.length; this.shown++) {
      const entry = this.tokens[this.shown];
      const { expression, result } = entry;
      if (expression === undefined) this.row.append(...this.build(entry));
      else this.row.append(el("code", {}, `${expression} = ${result ?? "?"}`));
    }
  }

  build(entry) {
    const { token, logprob } = entry;
    const level = LIMITS.filter((limit) => Math.exp(logprob) < limit).length;
    const className = `token level${level}`;
    const ariaLabel = `${spoken(token)}, ${percent(logprob)}`;
    const button = el("button", { type: "button", className, ariaLabel }, visible(token));
    button.tabIndex = this.buttons.length ? -1 : 0;
    button.onclick = () => button.focus(); // which Safari leaves to the page
    button.onfocus = () => this.choose(button, entry);
    this.buttons.push(button);
    return token.includes("\n") ? [button, el("br")] : [button];
  }

  choose(button, { token, logprob, top_logprobs: top }) {
    for (const each of this.buttons) each.tabIndex = each === button ? 0 : -1;
    const others = top.filter((each) => each.token !== token);
    const all = [{ token, logprob }, ...others].sort((a, b) => b.logprob - a.logprob);
    const items = all.map((each) => {
      const tag = each.token === token ? "b" : "span";
      return el(tag, {}, el("code", {}, visible(each.token)), ` ${percent(each.logprob)}`);
    });
    this.choices.replaceChildren(...items.flatMap((item) => [item, " "]));
  }

  move(event) {
    if (!(event.key in STEPS)) return;
    const last = this.buttons.length - 1;
    const at = this.buttons.indexOf(document.activeElement) + STEPS[event.key];
    this.buttons[Math.min(Math.max(at, 0), last)].focus();
    event.preventDefault();
  }
}
