/* The chat page's behaviour; view.js is the looks, api.js the server, store.js the storage.

The URL names the conversation in view (#id), so that reload, back and a second tab work. Replies
continue in the background. The log is not a live region, as a screen reader would read every
token: only the finished reply is announced, in a separate region. */

import { ApiError, hasReport, loadModels, loadRuns, streamReply, streamText } from "./api.js";
import { el } from "./dom.js";
import { Store, textOf } from "./store.js";
import { button, copy, entersMessage, isTouch } from "./view.js";
import { entryView, questionView, ReplyView } from "./view.js";

const TOAST_MS = 10_000;
const FULL = "The browser's storage is full: export your conversations and delete old ones.";
const KEYS = "Enter sends, Shift+Enter starts a line, Esc stops";
const named = [...document.querySelectorAll("[id]")];
const page = Object.fromEntries(named.map((element) => [element.id, element]));
const store = new Store(() => toast(FULL));
const streams = new Map(); // id (undefined: the draft) -> AbortController of what is being written
const unfinished = new Set(); // the replies being written
const oddsOf = new WeakMap(); // reply -> its tokens with their probabilities; too large to store
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
  const messages = conversation?.messages ?? [];
  const hadFocus = page.log.contains(document.activeElement);
  const elements = messages.map((message, i) => {
    const onEdit = (text) => resend(conversation, i, text);
    if (message.role === "user") return questionView(message, onEdit);
    lastViews = [message, message.other].filter(Boolean).map((each) => {
      const odds = store.settings.odds && oddsOf.get(each);
      return new ReplyView(each, nameOf(each), odds, () => again(conversation));
    });
    const articles = lastViews.map(({ element }) => element);
    return message.other ? el("div", { className: "pair" }, ...articles) : articles[0];
  });
  page.log.replaceChildren(...elements);
  page.welcome.hidden = messages.length > 0;
  const drafting = isDraft();
  for (const name of ["scroller", "input"]) page[name].hidden = drafting;
  for (const name of ["draft", "undo"]) page[name].hidden = !drafting;
  page.other.hidden = drafting;
  page.keys.textContent = drafting ? "Ctrl+Enter continues, Esc stops" : KEYS;
  if (hadFocus) page.log.focus({ preventScroll: true });
  showState();
  showList();
}

/* Whatever changes when a reply begins and when it ends. */
function showState() {
  const live = streams.has(shown?.id);
  if (shown && live) for (const view of lastViews) view.update(unfinished.has(view.message));
  page.log.classList.toggle("busy", live);
  page.send.textContent = live ? "Stop" : isDraft() ? "Continue" : "Send";
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
  page.title.textContent = shown?.title ?? (isDraft() ? "Text" : "New conversation");
  document.title = shown ? `${shown.title} · nanochat` : "nanochat";
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

/* Short for a model, or for a reply's: without what the names of all models begin with. */
function nameOf({ id, model = id }) {
  if (models.length < 2 || !model) return "nanochat";
  let prefix = models[0].id.replace(/[^-]*$/, "");
  while (!models.every(({ id }) => id.startsWith(prefix))) prefix = prefix.replace(/[^-]*-$/, "");
  return String(model).replace(prefix, "");
}

async function findModels() {
  models = await loadModels(store.settings);
  const isOne = models.length < 2;
  const name = ({ id }) => (isOne ? id : id.replace(/^nanochat-/, ""));
  page.model.replaceChildren(...models.map((card) => new Option(name(card), card.id)));
  const others = isOne ? [] : models.map((card) => new Option(`with ${nameOf(card)}`, card.id));
  page.other.replaceChildren(new Option("compare with …", ""), ...others);
  for (const field of [page.model, page.other]) field.disabled = isOne;
  page.models.hidden = false;
  page.models.classList.toggle("one", isOne);
  showSettings();
}

function chooseModel() {
  streams.get(undefined)?.abort();
  saveSettings();
  if (chosen()?.kind === "base") location.hash = "";
  show(chosen()?.kind === "base" ? null : shown);
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
  if (!text || streams.has(shown?.id)) return;
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

function again(conversation) {
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

async function answer(conversation) {
  const asked = history(conversation.messages);
  const controller = new AbortController();
  streams.set(conversation.id, controller);
  if (!models.length) await findModels().catch(() => null); // else the replies below tell of it
  const names = page.other.value ? [chosen().id, page.other.value] : [chosen()?.id];
  const note = "interrupted"; // until its end is known
  const replies = names.map((model) => ({ role: "assistant", content: [], note, model }));
  for (const reply of replies) {
    unfinished.add(reply);
    if (store.settings.odds) oddsOf.set(reply, []);
  }
  replies[0].other = replies[1];
  conversation.messages.push(replies[0]);
  conversation.updated = Date.now();
  store.save(conversation);
  open(conversation);
  await Promise.all(replies.map((reply) => write(conversation, reply, asked, controller.signal)));
  streams.delete(conversation.id);
  if (conversation !== shown) return;
  showState();
  const said = replies.map((reply) => `${nameOf(reply)}: ${textOf(reply)}`);
  page.announcer.textContent = said.join("\n");
}

async function write(conversation, reply, asked, signal) {
  try {
    const started = performance.now();
    const card = models.find(({ id }) => id === reply.model);
    if (card?.loaded === false) waitFor(reply, "the model is being loaded");
    for await (const piece of streamReply(reply.model, asked, store.settings, signal)) {
      if (card) card.loaded = true;
      take(reply, piece, (performance.now() - started) / 1000);
      waitFor(reply, piece.queued ? `queued: ${piece.queued}` : "");
    }
  } catch (error) {
    if (signal.aborted) reply.note = "stopped";
    else reply.error = error.message;
    if (reply.error) findModels().catch(() => null); // a restarted server may have others
    if (reply.error && !(error instanceof ApiError)) reportError(error);
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
function waitFor(reply, what) {
  const view = viewOf(reply);
  if (!view) return;
  view.waiting = what;
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

function saveDraft(added = store.draft.added) {
  store.saveDraft({ text: page.draft.value, added });
  showState();
}

async function goOn() {
  const { draft } = page;
  const at = draft.value.length;
  const controller = new AbortController();
  streams.set(undefined, controller);
  showState();
  try {
    const pieces = streamText(chosen().id, draft.value, store.settings, controller.signal);
    for await (const { text, usage } of pieces) {
      const isAtEnd = draft.scrollHeight - draft.scrollTop - draft.clientHeight < 40;
      const end = draft.value.length;
      draftTokens = usage?.total_tokens ?? draftTokens;
      draft.setRangeText((text ?? "").replaceAll("\r", ""), end, end, "end");
      if (isAtEnd) draft.scrollTop = draft.scrollHeight;
    }
  } catch (error) {
    if (error instanceof ApiError) toast(error.message);
    else if (!controller.signal.aborted) reportError(error);
  }
  streams.delete(undefined);
  const text = draft.value.slice(at);
  saveDraft(text ? [...store.draft.added, { at, text }] : undefined);
  page.announcer.textContent = text;
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

const stop = () => streams.get(shown?.id)?.abort();

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

function listen() {
  page.send.onclick = (event) => {
    if (streams.has(shown?.id)) stop();
    else if (isDraft()) goOn();
    else submit(event);
  };
  page.draft.oninput = () => saveDraft();
  page.draft.onkeydown = ({ key, ctrlKey, metaKey }) => {
    if (key === "Enter" && (ctrlKey || metaKey) && !streams.has(undefined)) goOn();
  };
  page.undo.onclick = takeBack;
  page.model.oninput = chooseModel;
  page.input.oninput = fitInput;
  page.input.onkeydown = (event) => {
    if (entersMessage(event)) submit(event);
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
    if (!models.length) findModels().then(() => show(shown), () => null); // now with a key, perhaps
  };
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => {
    const id = location.hash.slice(1);
    if (id !== (shown?.id ?? "")) open(store.conversations.get(id) ?? null);
  });
  addEventListener("storage", () => {
    if (streams.size) return; // what is being written here stays
    store.load();
    page.draft.value = store.draft.text;
    show(store.conversations.get(shown?.id) ?? null);
    showSettings();
  });
  addEventListener("pagehide", () => {
    for (const each of store.list()) if (streams.has(each.id)) store.save(each);
    if (streams.has(undefined)) saveDraft();
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
  page.runs.hidden = !(await loadRuns(store.settings).catch(() => [])).length;
}

start();
