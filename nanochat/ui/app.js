/* The chat page's behaviour; view.js is the looks, api.js the server, store.js the storage.

The URL names the conversation in view (#id), so that reload, back and a second tab work. Replies
continue in the background. The log is not a live region, as a screen reader would read every
token: only the finished reply is announced, in a separate region. */

import { ApiError, hasReport, loadModel, streamReply } from "./api.js";
import { el } from "./markdown.js";
import { Store, textOf } from "./store.js";
import { button, copy, entersMessage, isTouch } from "./view.js";
import { entryView, questionView, ReplyView } from "./view.js";

const TOAST_MS = 10_000;
const FULL = "The browser's storage is full: export your conversations and delete old ones.";
const named = [...document.querySelectorAll("[id]")];
const page = Object.fromEntries(named.map((element) => [element.id, element]));
const store = new Store(() => toast(FULL));
const streams = new Map(); // conversation id -> AbortController of the reply being written
let model = null; // as /v1/models describes it, once the server has answered
let shown = null; // the conversation in view; null for a new one
let lastReply = null; // the view of its last reply, if it has one
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
    lastReply = new ReplyView(message, () => again(conversation));
    return lastReply.element;
  });
  page.log.replaceChildren(...elements);
  page.welcome.hidden = messages.length > 0;
  if (hadFocus) page.log.focus({ preventScroll: true });
  showState();
  showList();
}

/* Whatever changes when a reply begins and when it ends. */
function showState() {
  const live = streams.has(shown?.id);
  if (live) lastReply.update(true);
  page.log.classList.toggle("busy", live);
  page.send.textContent = live ? "Stop" : "Send";
  page.send.classList.toggle("stop", live);
  const used = shown?.messages.findLast(({ tokens }) => tokens)?.tokens ?? 0;
  const length = model?.context_length;
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
  page.title.textContent = shown?.title ?? "New conversation";
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

async function findModel() {
  model = await loadModel(store.settings);
  page.model.textContent = model.id;
}

/* ---- what a person does ---- */

function open(conversation) {
  pinned = true;
  location.hash = conversation?.id ?? "";
  show(conversation);
  if (page.side.matches(":popover-open")) page.side.hidePopover();
  if (!conversation) page.input.focus();
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
  if (page.form.checkValidity()) store.saveSettings(Object.fromEntries(new FormData(page.form)));
}

function showSettings() {
  for (const field of page.form.elements) {
    if (field.name in store.settings) field.value = store.settings[field.name];
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
  const reply = { role: "assistant", content: [], note: "interrupted" }; // until its end is known
  const controller = new AbortController();
  conversation.messages.push(reply);
  conversation.updated = Date.now();
  streams.set(conversation.id, controller);
  store.save(conversation);
  open(conversation);
  try {
    if (!model) await findModel();
    const started = performance.now();
    for await (const piece of streamReply(model.id, asked, store.settings, controller.signal)) {
      take(reply, piece, (performance.now() - started) / 1000);
      if (conversation === shown) redraw(piece);
    }
  } catch (error) {
    if (controller.signal.aborted) reply.note = "stopped";
    else reply.error = error.message;
    if (reply.error) findModel().catch(() => null); // a restarted server may have another one
    if (reply.error && !(error instanceof ApiError)) throw error;
  } finally {
    streams.delete(conversation.id);
    if (store.conversations.get(conversation.id) === conversation) store.save(conversation);
    if (conversation === shown) {
      lastReply.update(false);
      showState();
      page.announcer.textContent = `nanochat: ${textOf(reply)}`;
    }
  }
}

function take(reply, { text, tool, finish, usage, timings }, seconds) {
  const last = reply.content.at(-1);
  const add = (type, text) => reply.content.push({ type, text });
  if (text || tool) reply.stats ??= `first token ${seconds.toFixed(2)} s`;
  if (text && last?.type === "text") last.text += text;
  else if (text) add("text", text);
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

function redraw({ queued }) {
  lastReply.queued = queued;
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (!streams.has(shown?.id)) return;
    lastReply.update(true);
    follow();
  });
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
  else if (key === "/" && !typing) page.input.focus();
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
  page.send.onclick = (event) => (streams.has(shown?.id) ? stop() : submit(event));
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
  page.form.oninput = page.theme.oninput = saveSettings;
  page.form.onreset = () => setTimeout(saveSettings); // once the fields are empty
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => {
    const id = location.hash.slice(1);
    if (id !== (shown?.id ?? "")) open(store.conversations.get(id) ?? null);
  });
  addEventListener("storage", () => {
    if (streams.size) return; // what is being written here stays
    store.load();
    show(store.conversations.get(shown?.id) ?? null);
    showSettings();
  });
  addEventListener("pagehide", () => {
    for (const each of store.list()) if (streams.has(each.id)) store.save(each);
  });
}

async function start() {
  listen();
  showSettings();
  open(store.conversations.get(location.hash.slice(1)) ?? null);
  page.report.hidden = !(await hasReport());
  await findModel().catch(() => null); // a server that is down is reported on the first question
  showState();
}

start();
