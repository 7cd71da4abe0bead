/* How a conversation looks: a question, a reply that grows, and an entry of the list of
conversations; style.css hides the buttons that make no sense at the moment. */

import { el } from "./dom.js";
import { showMarkdown } from "./markdown.js";
import { partsOf, textOf } from "./store.js";
import { TokensView } from "./tokens.js";

export const button = (label, onclick, properties) =>
  el("button", { type: "button", onclick, ...properties }, label);
const copyButton = (message) => button("Copy", ({ target }) => copy(textOf(message), target));
const actionsOf = (...buttons) => el("div", { className: "actions" }, ...buttons);

/* Copies a text; without https, where the browser offers no clipboard, by way of a selection. */
export async function copy(text, pressed) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    const field = el("textarea", { value: text, className: "unseen" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    pressed.focus();
  }
  pressed.textContent = "Copied";
  setTimeout(() => (pressed.textContent = "Copy"), 1500);
}

export const isTouch = () => matchMedia("(pointer: coarse)").matches;

/* Whether a key sends: Enter does, but not on a touch screen, with Shift, or in an input method. */
export const sends = ({ key, shiftKey, isComposing }) =>
  key === "Enter" && !shiftKey && !isComposing && !isTouch();

const article = (className, who, ...children) =>
  el("article", { className }, el("h2", { className: "who" }, who), ...children);

/* A question; `onEdit` gets its new text. */
export function questionView(message, onEdit) {
  const field = el("textarea", { ariaLabel: "Edit your message", rows: 3 });
  const show = (focused, ...parts) => {
    element.replaceChildren(element.firstChild, ...parts);
    focused.focus();
  };
  const open = () => {
    field.value = message.content;
    show(field, form);
  };
  const close = () => show(edit, said, actions);
  const send = () => field.value.trim() && onEdit(field.value.trim());
  field.onkeydown = (event) => {
    if (event.key === "Escape") close();
    else if (sends(event)) send();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const edit = button("Edit", open, { className: "change" });
  const said = el("div", { className: "said", dir: "auto" }, message.content);
  const actions = actionsOf(edit, copyButton(message));
  const choices = actionsOf(button("Send again", send), button("Cancel", close));
  const form = el("div", { className: "edit" }, field, choices);
  const element = article("question", "You", said, actions);
  return element;
}

export class ReplyView {
  /* By `name`; `onAgain` asks for another reply. With `odds` it is shown by its tokens. */
  constructor(message, name, odds, onAgain) {
    const again = (label) => button(label, onAgain, { className: "change again" });
    this.message = message;
    this.waiting = ""; // for what
    this.tokens = odds && new TokensView(odds);
    this.said = el("div", { className: odds ? "said" : "said markdown" });
    if (odds) this.said.append(this.tokens.element);
    this.state = el("span", { className: "state" });
    this.reason = el("p");
    this.problem = el("div", { className: "problem", role: "alert" }, this.reason, again("Retry"));
    const actions = actionsOf(copyButton(message), again("Regenerate"), this.state);
    this.element = article("reply", name, this.said, this.problem, actions);
    this.update(false);
  }

  /* Shows what the reply holds by now. */
  update(live) {
    const { stats, note, error } = this.message;
    this.element.classList.toggle("live", live);
    if (this.tokens) this.tokens.update();
    else showMarkdown(this.said, partsOf(this.message), live);
    this.state.textContent = live ? this.waiting : [note, stats].filter(Boolean).join(" · ");
    this.reason.textContent = error ?? "";
    this.problem.hidden = !error;
  }
}

/* An entry of the list; `onRename` gets the new title. */
export function entryView({ id, title }, isShown, onRename, onDelete) {
  const named = (verb) => ({ ariaLabel: `${verb} “${title}”` });
  const link = el("a", { href: `#${id}`, title, ariaCurrent: isShown ? "page" : null }, title);
  const rename = () => {
    const field = el("input", { value: title, ariaLabel: "New title" });
    field.onblur = () => onRename(field.value.trim() || title);
    field.onkeydown = (event) => {
      event.stopPropagation();
      if (event.key === "Escape") field.value = title;
      if (event.key === "Enter" || event.key === "Escape") field.blur();
    };
    entry.replaceChildren(field);
    field.select();
  };
  const actions = { Rename: rename, Delete: onDelete };
  const buttons = Object.entries(actions).map(([verb, act]) => button(verb, act, named(verb)));
  const entry = el("li", {}, link, actionsOf(...buttons));
  return entry;
}
