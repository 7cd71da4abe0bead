/* Conversations and settings in the browser's local storage, one entry each, so that tabs hardly
conflict. The server stores nothing.

A conversation is {id, title, updated, messages}. Messages have the form that nanochat trains on
(a reply is a list of text, python and python_output parts), so an export works as `--custom FILE`.
A reply's `other` is what a second model answered, to be compared; no model is shown it.
*/

const PREFIX = "nanochat:conversation:";
const SETTINGS = "nanochat:settings";
export const DRAFT = "nanochat:draft";
const PARTS = ["text", "python", "python_output"];
export const idOf = (key) => key.split(PREFIX)[1]; // undefined if it is of no conversation

export const partsOf = ({ content }) =>
  typeof content === "string" ? [{ type: "text", text: content }] : content;

export const textOf = (message) =>
  partsOf(message).map(({ type, text }) => (type === "text" ? text : "")).join("");

/* An entry's value; null if there is none, or if it is damaged. */
function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

export const readSettings = () => read(SETTINGS) ?? {};

export class Store {
  constructor(onFull) {
    this.onFull = onFull; // called when the browser has no room left
    this.conversations = new Map();
    for (const key of [SETTINGS, DRAFT, ...Object.keys(localStorage)]) this.load(key);
  }

  /* Reads an entry, anew once another tab has changed it. */
  load(key) {
    const value = read(key);
    if (key === SETTINGS) this.settings = value ?? {};
    else if (key === DRAFT) this.draft = value ?? { text: "", added: [] };
    else if (idOf(key) && value) this.conversations.set(idOf(key), value);
    else this.conversations.delete(idOf(key));
  }

  /* Newest first. */
  list() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  create(question) {
    return { id: newId(), title: titleOf(question), updated: Date.now(), messages: [] };
  }

  save(conversation) {
    this.conversations.set(conversation.id, conversation);
    this.write(PREFIX + conversation.id, conversation);
  }

  delete({ id }) {
    this.conversations.delete(id);
    localStorage.removeItem(PREFIX + id);
  }

  saveSettings(settings) {
    this.settings = settings;
    this.write(SETTINGS, settings);
  }

  /* The text that a base model goes on with, and what it added: {text, added: [{at, text}]}. */
  saveDraft(draft) {
    this.draft = draft;
    this.write(DRAFT, draft);
  }

  write(key, value) {
    try {
      localStorage.setItem(key, JSON.stringify(value));
    } catch {
      this.onFull();
    }
  }

  /* All conversations, one a line. */
  exportText() {
    return this.list().map((conversation) => `${JSON.stringify(conversation)}\n`).join("");
  }

  /* Adds the conversations of an export and counts the new ones. If one is malformed, adds none,
     and throws. */
  importText(text) {
    const lines = text.split("\n").filter((line) => line.trim());
    const found = lines.map((line, i) => checked(JSON.parse(line), i + 1));
    const here = new Set([...this.conversations.values()].map((each) => JSON.stringify(each)));
    const fresh = found.filter((conversation) => !here.has(JSON.stringify(conversation)));
    for (const each of fresh) {
      this.save(this.conversations.has(each.id) ? { ...each, id: newId() } : each);
    }
    return fresh.length;
  }
}

const titleOf = (text) => text.replace(/\s+/g, " ").replace(/(?<=^.{60}).+/u, "…");

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(36)).join("");
}

/* The conversation in `value`, with what the page knows of it and nothing else. */
function checked(value, number) {
  const found = Array.isArray(value) ? { messages: value } : value;
  const { id, title, updated, messages } = found ?? {};
  const isPart = (part) => PARTS.includes(part?.type) && typeof part.text === "string";
  const isMessage = (message) => {
    if (!["user", "assistant"].includes(message?.role) || isNaN(message.tokens ?? 0)) return false;
    const { other, note, stats, error, model } = message;
    if ([note, stats, error, model].some((each) => typeof (each ?? "") !== "string")) return false;
    const parts = partsOf(message);
    return Array.isArray(parts) && parts.every(isPart) && (other === undefined || isMessage(other));
  };
  if (!Array.isArray(messages) || !messages.length || !messages.every(isMessage)) {
    throw new Error(`conversation ${number} is not in nanochat's form`);
  }
  return {
    id: /^[a-z0-9]+$/.test(id ?? "") ? id : newId(),
    title: String(title ?? titleOf(textOf(messages[0]))),
    updated: Number(updated) || Date.now(),
    messages,
  };
}
