/* The chat page's behaviour; view.js is the looks, api.js the server, store.js the storage.

The URL names the conversation in view (#id), so that reload, back and a second tab work. Replies
continue in the background. The log is not a live region, as a screen reader would read every
token: only the finished reply is announced, in a separate region. */

import { ApiError, hasReport, loadModels, streamReply, streamText } from "./api.js";
import { el } from "./dom.js";
import { DRAFT, idOf, Store, textOf } from "./store.js";
import { button, copy, entryView, isTouch, questionView, ReplyView, sends } from "./view.js";

const TOAST_MS = 10_000;
const LOADING = "the model is being loaded";
const FULL = "The browser's storage is full: export your conversations and delete old ones.";
const KEYS = "Enter sends, Shift+Enter starts a line, Esc stops";
const DRAFT_ID = ""; // stands for the draft among the ids of the conversations
const named = [...document.querySelectorAll("[id]")];
const page = Object.fromEntries(named.map((element) => [element.id, element]));
const store = new Store(() => toast(FULL));
const streams = new Map(); // id -> AbortController of what is being written
const unfinished = new Set(); // the replies being written
const oddsOf = new WeakMap(); // reply -> its tokens with their probabilities; too large to store
let prefix = ""; // of the models' names, and not shown
let models = []; // as /v1/models describes them, once the server has answered
let shown = null; // the conversation in view; null for a new one, or for the draft
let draftTokens = 0;
let lastViews = []; // of its last reply: one, or two to compare
let frame = 0; // the pending animation frame
let pinned = true; // whether the end of the log stays in view
let lastTop = 0;
let toastTimer = 0;

/* ---- what is in view ---- */

function show(conversation) {
  shown = conversation;
  lastViews = [];
  const messages = conversation?.messages ?? [];
  const hadFocus = page.log.contains(document.activeElement);
  const elements = messages.map((message, i) => {
    const onEdit = (text) => resend(conversation, i, text);
    if (message.role === "user") return questionView(message, onEdit);
    lastViews = [message, message.other].filter(Boolean).map((each) => {
      const odds = store.settings.odds && oddsOf.get(each);
      return new ReplyView(each, nameOf(each), odds, () => again(conversation, each));
    });
    const articles = lastViews.map(({ element }) => element);
    return message.other ? el("div", { className: "pair" }, ...articles) : articles[0];
  });
  page.log.replaceChildren(...elements);
  page.welcome.hidden = messages.length > 0;
  if (hadFocus) page.log.focus({ preventScroll: true });
  showList();
}

/* Whatever changes when a reply begins and ends, a model is chosen, or a text has to wait. */
function showState(waiting) {
  const live = streams.has(shownId());
  const drafting = isDraft();
  for (const name of ["scroller", "input", "other"]) page[name].hidden = drafting;
  for (const name of ["draft", "undo"]) page[name].hidden = !drafting;
  page.keys.textContent = drafting ? waiting || "Ctrl+Enter continues, Esc stops" : KEYS;
  page.title.textContent = shown?.title ?? (drafting ? "Text" : "New conversation");
  document.title = shown ? `${shown.title} · nanochat` : "nanochat";
  if (shown && live) for (const view of lastViews) view.update(unfinished.has(view.message));
  page.log.classList.toggle("busy", live);
  page.send.textContent = live ? "Stop" : drafting ? "Continue" : "Send";
  page.send.classList.toggle("stop", live);
  page.draft.readOnly = live;
  page.undo.disabled = live || !lastAdded();
  const used = shown ? shown.messages.findLast(({ tokens }) => tokens)?.tokens ?? 0 : draftTokens;
  const length = chosen()?.context_length;
  if (length) {
    const [part, whole] = [used, length].map((number) => number.toLocaleString("en"));
    page.context.textContent = `context ${part} of ${whole}`;
    page.gauge.style.width = `${(100 * used) / length}%`;
  }
  follow();
}

function showList() {
  const rename = (conversation, title) => {
    Object.assign(conversation, { title });
    store.save(conversation);
    showList();
    page.list.querySelector("[aria-current]")?.focus();
  };
  const entries = store.list().map((each) => {
    return entryView(each, each === shown, (title) => rename(each, title), () => remove(each));
  });
  page.list.replaceChildren(...entries);
  showState(); // the title, too
}

function follow(pin = pinned) {
  pinned = pin;
  if (pinned) page.scroller.scrollTop = page.scroller.scrollHeight;
  page.latest.hidden = pinned;
}

function toast(text, undo) {
  const action = button("Undo", () => {
    page.toast.replaceChildren();
    undo();
  });
  page.toast.replaceChildren(text, ...(undo ? [action] : []));
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => page.toast.replaceChildren(), TOAST_MS);
}

/* ---- models ---- */

const chosen = () => models.find(({ id }) => id === page.model.value) ?? models[0];
const isDraft = () => !shown && chosen()?.kind === "base"; // else a conversation is in view
const shownId = () => shown?.id ?? DRAFT_ID;

/* Short for a model, or for a reply's: what tells it from the others. */
function nameOf({ id, model = id }) {
  if (models.length < 2 || !model) return "nanochat";
  return model.startsWith(prefix) ? model.slice(prefix.length) : model;
}

/* The words, as of nanochat-d6-, that all these names begin with. */
function sharedWords(names) {
  const [first, ...others] = names.map((name) => name.split("-"));
  const differs = (word, i) => others.some((words) => words[i] !== word);
  const shared = first.slice(0, -1);
  const end = shared.findIndex(differs);
  return shared.slice(0, end < 0 ? undefined : end).map((word) => `${word}-`).join("");
}

async function findModels(signal) {
  models = await loadModels(store.settings, signal);
  prefix = sharedWords(models.map(({ id }) => id));
  const isOne = models.length < 2;
  const name = (card) => (isOne ? card.id : nameOf(card));
  page.model.replaceChildren(...models.map((card) => new Option(name(card), card.id)));
  const others = isOne ? [] : models.map((card) => new Option(`with ${nameOf(card)}`, card.id));
  page.other.replaceChildren(new Option("compare with …", ""), ...others);
  for (const field of [page.model, page.other]) field.disabled = isOne;
  page.models.hidden = false;
  page.models.classList.toggle("one", isOne);
  showSettings();
  showState();
}

/* A conversation in view stays there; a new one, with a base model, is a text. */
function chooseModel() {
  streams.get(DRAFT_ID)?.abort();
  saveSettings();
  showState();
}

/* ---- what a person does ---- */

function open(conversation) {
  pinned = true;
  location.hash = conversation?.id ?? "";
  show(conversation);
  if (page.side.matches(":popover-open")) page.side.hidePopover();
  if (!conversation) page[isDraft() ? "draft" : "input"].focus();
}

function send(text) {
  const conversation = shown ?? store.create(text);
  conversation.messages.push({ role: "user", content: text });
  answer(conversation);
}

function submit(event) {
  event.preventDefault();
  const text = page.input.value.trim();
  if (!text || streams.has(shownId())) return;
  page.input.value = "";
  fitInput();
  if (!isTouch()) page.input.focus();
  send(text);
}

function resend(conversation, index, text) {
  const before = [...conversation.messages];
  conversation.messages.length = index;
  send(text);
  if (before.length <= index + 2) return;
  toast("The messages after it are gone.", () => {
    streams.get(conversation.id)?.abort();
    conversation.messages = before;
    store.save(conversation);
    open(conversation);
  });
}

/* Another reply, or two; but if one of two failed, the other stays. */
function again(conversation, reply) {
  if (reply.error && conversation.messages.at(-1).other) return answer(conversation, reply);
  conversation.messages.pop();
  answer(conversation);
}

function remove(conversation) {
  streams.get(conversation.id)?.abort();
  store.delete(conversation);
  if (conversation === shown) open(null);
  else showList();
  toast(`“${conversation.title}” is deleted.`, () => {
    store.save(conversation);
    open(conversation);
  });
}

async function importFile(file) {
  try {
    const count = store.importText(await file.text());
    toast(`${count} new ${count === 1 ? "conversation" : "conversations"}.`);
    showList();
  } catch (error) {
    toast(`${file.name} was not imported: ${error.message}`);
  }
  page.file.value = ""; // else choosing the same file again would be no change
}

function exportFile() {
  const href = URL.createObjectURL(new Blob([store.exportText()], { type: "application/jsonl" }));
  const today = new Date().toISOString().slice(0, 10);
  el("a", { href, download: `nanochat-${today}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000); // the download has read it by then
}

function saveSettings() {
  document.documentElement.dataset.theme = page.theme.value;
  if (!page.form.checkValidity()) return;
  const before = store.settings; // what is disabled or not ticked is missing in the form's data
  store.saveSettings({ ...before, odds: "", ...Object.fromEntries(new FormData(page.form)) });
  if (!before.odds !== !store.settings.odds) show(shown);
}

function showSettings() {
  for (const field of page.form.elements) {
    if (field.type === "checkbox") field.checked = Boolean(store.settings.odds);
    else if (field.name in store.settings) field.value = store.settings[field.name];
    if (field.selectedIndex < 0) field.selectedIndex = 0; // what was chosen is no longer there
  }
  document.documentElement.dataset.theme = page.theme.value;
}

/* ---- a reply ---- */

/* What the model is to see: without the questions that it never answered. */
function history(messages) {
  const isEmpty = (message) => message?.content.length === 0;
  const kept = messages.filter((message, i) => !isEmpty(message) && !isEmpty(messages[i + 1]));
  return kept.map(({ role, content }) => ({ role, content }));
}

/* The reply, emptied. */
function begin(reply) {
  unfinished.add(reply);
  oddsOf.set(reply, store.settings.odds ? [] : null);
  const note = "interrupted"; // until its end is known
  return Object.assign(reply, { content: [], note, error: undefined, stats: undefined });
}

/* Adds a reply, or two to compare; or replaces only the one that `failed`. */
async function answer(conversation, failed) {
  const controller = new AbortController();
  streams.set(conversation.id, controller);
  const reply = begin(failed ?? { role: "assistant" });
  if (!failed) conversation.messages.push(reply);
  conversation.updated = Date.now();
  store.save(conversation); // before anything that takes time, as the question is in no field now
  open(conversation);
  if (!models.length) await findModels(controller.signal).catch(() => null); // told below
  if (!failed) {
    reply.model = chosen()?.id;
    if (page.other.value) reply.other = begin({ role: "assistant", model: page.other.value });
    if (conversation === shown) show(conversation);
  }
  const asked = history(conversation.messages.slice(0, -1));
  const replies = failed || !reply.other ? [reply] : [reply, reply.other];
  await Promise.all(replies.map((reply) => write(conversation, reply, asked, controller.signal)));
  streams.delete(conversation.id);
  if (conversation !== shown) return;
  showState();
  const said = replies.map((reply) => `${nameOf(reply)}: ${textOf(reply)}`);
  page.announcer.textContent = said.join("\n");
}

function faultOf(error) {
  findModels().catch(() => null); // a restarted server may have others
  if (!(error instanceof ApiError)) reportError(error); // a fault of the page's own
  return error.message;
}

async function write(conversation, reply, asked, signal) {
  try {
    const started = performance.now();
    const card = models.find(({ id }) => id === reply.model);
    if (card?.loaded === false) redraw(reply, LOADING);
    for await (const piece of streamReply(reply.model, asked, store.settings, signal)) {
      if (card) card.loaded = true;
      take(reply, piece, (performance.now() - started) / 1000);
      redraw(reply, piece.queued ? `queued: ${piece.queued}` : "");
    }
  } catch (error) {
    if (signal.aborted) reply.note = "stopped";
    else reply.error = faultOf(error);
  } finally {
    unfinished.delete(reply);
    if (store.conversations.get(conversation.id) === conversation) store.save(conversation);
    if (conversation === shown) viewOf(reply)?.update(false);
  }
}

function take(reply, { text, tool, odds, finish, usage, timings }, seconds) {
  const last = reply.content.at(-1);
  const add = (type, text) => reply.content.push({ type, text });
  if (text || tool) reply.stats ??= `first token ${seconds.toFixed(2)} s`;
  if (text && last?.type === "text") last.text += text;
  else if (text) add("text", text);
  if (odds || tool) oddsOf.get(reply)?.push(...(odds ?? [tool]));
  if (tool) add("python", tool.expression);
  if (tool && tool.result !== null) add("python_output", tool.result);
  if (finish) reply.note = finish === "length" ? "ended by the limit on tokens" : "";
  if (usage) reply.tokens = usage.total_tokens;
  if (timings) {
    const { tokens_per_second: speed, first_token_seconds: first } = timings;
    const tokens = `${speed.toFixed(speed < 10 ? 1 : 0)} tok/s · first token ${first.toFixed(2)} s`;
    reply.stats = `${tokens} · context ${reply.tokens}`;
  }
}

const viewOf = (reply) => lastViews.find(({ message }) => message === reply);

/* Shows a reply, if it is in view, and what it waits for. */
function redraw(reply, waiting) {
  const view = viewOf(reply);
  if (!view) return;
  view.waiting = waiting;
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    for (const view of lastViews) if (unfinished.has(view.message)) view.update(true);
    follow();
  });
}

/* ---- a text that a base model goes on with ---- */

const lastAdded = () => {
  const added = store.draft.added.at(-1);
  return added && page.draft.value.startsWith(added.text, added.at) ? added : null;
};

function saveDraft(added = page.draft.value ? store.draft.added : []) {
  if (!page.draft.value) draftTokens = 0;
  store.saveDraft({ text: page.draft.value, added });
  showState();
}

async function goOn() {
  const { draft } = page;
  const { added } = store.draft;
  const at = draft.value.length;
  const card = chosen();
  const controller = new AbortController();
  const grown = () => draft.value.slice(at);
  const save = () => saveDraft(grown() ? [...added, { at, text: grown() }] : added);
  streams.set(DRAFT_ID, controller);
  addEventListener("pagehide", save);
  showState(card.loaded === false && LOADING);
  try {
    const pieces = streamText(card.id, draft.value, store.settings, controller.signal);
    for await (const { queued, text, usage } of pieces) {
      card.loaded = true;
      const isAtEnd = draft.scrollHeight - draft.scrollTop - draft.clientHeight < 40;
      const end = draft.value.length;
      draftTokens = usage?.total_tokens ?? draftTokens;
      draft.setRangeText((text ?? "").replaceAll("\r", ""), end, end, "end");
      if (isAtEnd) draft.scrollTop = draft.scrollHeight;
      showState(queued && `queued: ${queued}`);
    }
  } catch (error) {
    if (!controller.signal.aborted) toast(faultOf(error));
  }
  removeEventListener("pagehide", save);
  if (streams.get(DRAFT_ID) !== controller) return; // another tab's text took its place
  streams.delete(DRAFT_ID);
  save();
  page.announcer.textContent = grown();
}

function takeBack() {
  const { at, text } = lastAdded();
  page.draft.setRangeText("", at, at + text.length, "end");
  saveDraft(store.draft.added.slice(0, -1));
  page.draft.focus();
}

/* ---- events ---- */

function fitInput() {
  page.input.style.height = "auto";
  page.input.style.height = `${page.input.scrollHeight}px`;
}

const stop = () => streams.get(shownId())?.abort();

function onKey(event) {
  const { key, shiftKey, ctrlKey, metaKey, target } = event;
  const typing = target.closest("input, textarea, select, dialog");
  if (key === "Escape" && !document.querySelector(":modal, :popover-open")) stop();
  else if (key?.toLowerCase() === "o" && shiftKey && (ctrlKey || metaKey)) open(null);
  else if (key === "/" && !typing) page[isDraft() ? "draft" : "input"].focus();
  else return;
  event.preventDefault();
}

function onScroll() {
  const { scrollTop, scrollHeight, clientHeight } = page.scroller;
  pinned = scrollHeight - scrollTop - clientHeight < 40 || (pinned && scrollTop >= lastTop);
  lastTop = scrollTop;
  page.latest.hidden = pinned;
}

/* Another tab has changed an entry. Only what shows it is made anew: a form may be open. */
function onStorage({ key }) {
  const id = key && idOf(key);
  if (!key || streams.has(id)) return; // what is being written here stays
  store.load(key);
  if (key === DRAFT) takeDraft();
  else if (id && id === shown?.id) show(store.conversations.get(id) ?? null);
  else if (id) showList();
  else showSettings();
  showState();
}

/* Another tab's text takes the place of this one's, which can be had back if it was growing. */
function takeDraft() {
  const { value } = page.draft;
  page.draft.value = store.draft.text;
  streams.get(DRAFT_ID)?.abort();
  if (streams.delete(DRAFT_ID)) toast("The text was changed in another tab.", () => {
    page.draft.value = value;
    saveDraft([]);
  });
}

function listen() {
  page.send.onclick = (event) => {
    if (streams.has(shownId())) stop();
    else if (isDraft()) goOn();
    else submit(event);
  };
  page.draft.oninput = () => saveDraft();
  page.draft.onkeydown = ({ key, ctrlKey, metaKey }) => {
    if (key === "Enter" && (ctrlKey || metaKey) && !streams.has(DRAFT_ID)) goOn();
  };
  page.undo.onclick = takeBack;
  page.model.oninput = chooseModel;
  page.input.oninput = fitInput;
  page.input.onkeydown = (event) => {
    if (sends(event)) submit(event);
  };
  page.welcome.onclick = ({ target }) => {
    if (target.matches("button")) send(target.textContent);
  };
  page.scroller.onscroll = onScroll;
  page.latest.onclick = () => follow(true);
  page.log.onclick = ({ target }) => {
    const code = target.closest("figure")?.querySelector("code");
    if (target.matches(".copy-code")) copy(code.textContent, target);
  };
  page.new.onclick = page.newSmall.onclick = () => open(null);
  page.export.onclick = exportFile;
  page.import.onclick = () => page.file.click();
  page.file.onchange = () => importFile(page.file.files[0]);
  page.settingsButton.onclick = () => page.settings.showModal();
  page.form.oninput = page.theme.oninput = page.other.oninput = saveSettings;
  page.form.onreset = () => setTimeout(chooseModel); // once the fields are empty
  page.settings.onclose = () => {
    showSettings(); // what is not valid was not saved
    if (!models.length) findModels().then(() => show(shown), () => null); // now with a key, perhaps
  };
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => {
    const id = location.hash.slice(1);
    if (id !== (shown?.id ?? "")) open(store.conversations.get(id) ?? null);
  });
  addEventListener("storage", onStorage);
  addEventListener("pagehide", () => {
    for (const each of store.list()) if (streams.has(each.id)) store.save(each);
  });
}

async function start() {
  listen();
  showSettings();
  page.draft.value = store.draft.text;
  open(store.conversations.get(location.hash.slice(1)) ?? null);
  await findModels().catch(() => null); // a server that is down is reported on the first question
  show(shown);
  if (isDraft()) page.draft.focus();
  page.report.hidden = !(await hasReport());
}

start();
