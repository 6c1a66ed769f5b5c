// The chat: conversations, messages, and the one answer that may be on its way.

import { Refusal, fetchJson, generate } from "./api.js";
import { withKey } from "./key.js";
import { watchServer } from "./live.js";
import { parse, show } from "./markdown.js";
import * as store from "./store.js";
import { drawTimeline, duration } from "./timeline.js";

const byId = (id) => document.getElementById(id);
const log = byId("messages");
const prompt = byId("prompt");

let conversation = store.newConversation();
/** `{conversation, message, controller}` while an answer is on its way. */
let running = null;
/** The element that shows a message, for the messages on the page. */
const shown = new Map();

// ---- asking ---------------------------------------------------------------------------------------------------------

function send() {
  const content = prompt.value.trim();
  if (!content || running || !samplingIsValid()) return;
  prompt.value = "";
  fitPrompt();
  conversation.messages.push({ role: "user", content });
  answer();
}

/** Ask for an answer to the conversation as it stands. */
async function answer() {
  const message = { role: "assistant", content: "" };
  // An answer that failed before its first word is no part of what the model is told.
  const messages = conversation.messages.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
  const body = { messages, ...sampling(), return_steps: true };
  conversation.messages.push(message);
  running = { conversation, message, controller: new AbortController() };
  keep(conversation);
  showAll();
  let waiting = false;
  const draw = () => {
    waiting = false;
    showMessage(message);
  };
  const onDelta = (text) => {
    message.content += text;
    // Rendering at most once a frame keeps up with any rate of tokens.
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  };
  try {
    const signal = running.controller.signal;
    const done = await withKey(() => generate(body, signal, showTimeline, onDelta));
    message.note = noteOf(done);
    if (!byId("model").title) showModel();
    showTimeline(done.timing.hops_us, done.timing);
  } catch (error) {
    if (error.name === "AbortError") message.note = "stopped";
    else message.error = error instanceof Refusal ? error.message : `The connection to the server was lost (${error.message}).`;
  }
  const ended = running.conversation;
  running = null;
  // It may have been deleted meanwhile.
  if (ended === conversation || store.conversations().some(({ id }) => id === ended.id)) keep(ended);
  showAll();
}

function again() {
  if (running || !samplingIsValid()) return;
  conversation.messages.pop();
  answer();
}

function stop() {
  running?.controller.abort();
}

function noteOf({ finish_reason, usage, timing }) {
  const rate = timing.decode_tokens_per_second ?? timing.tokens_per_second;
  const length = finish_reason === "length" ? ", cut at max tokens" : "";
  const tokens = usage.completion_tokens === 1 ? "1 token" : `${usage.completion_tokens} tokens`;
  return `${rate.toFixed(1)} tokens/s · TTFB ${duration(timing.ttfb_us)} · ${tokens}${length}`;
}

function showTimeline(hops, timing) {
  drawTimeline(byId("timeline"), hops, timing);
}

async function showModel() {
  try {
    const model = await withKey(() => fetchJson("/model_info"));
    byId("model").textContent = model.served_model_name;
    byId("model").title = `context length ${model.context_length}`;
    document.title = `${model.served_model_name} - minisgl`;
  } catch (error) {
    byId("model").textContent = error.status === 401 ? "(needs its API key)" : "";
  }
}

// ---- messages -------------------------------------------------------------------------------------------------------

function showAll() {
  const messages = conversation.messages;
  const elements = messages.map((message) => shown.get(message) ?? elementOf(message));
  shown.clear();
  messages.forEach((message, index) => shown.set(message, elements[index]));
  elements.forEach((element, index) => {
    if (log.children[index] !== element) log.insertBefore(element, log.children[index] ?? null);
  });
  while (log.children.length > elements.length) log.lastChild.remove();
  messages.forEach(showMessage);
  log.classList.toggle("empty", messages.length === 0);
  // Screen readers then wait for the whole answer.
  log.setAttribute("aria-busy", String(running?.conversation === conversation));
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  showConversations();
}

function elementOf(message) {
  const element = document.createElement("article");
  element.className = message.role;
  element.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
  element.append(made("div", "text"), made("p", "error"), made("p", "note"));
  return element;
}

function showMessage(message) {
  const element = shown.get(message);
  if (!element) return;
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  const [text, error, note] = element.children;
  const arriving = running?.message === message;
  if (message.role === "user") text.textContent = message.content;
  else show(text, parse(message.content));
  element.classList.toggle("arriving", arriving);
  error.textContent = message.error ?? "";
  const last = conversation.messages.at(-1) === message && message.role === "assistant" && !running;
  note.replaceChildren(message.note ?? "", ...(last ? [againButton()] : []));
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function againButton() {
  const button = made("button", "plain");
  button.type = "button";
  button.textContent = "Try again";
  button.addEventListener("click", again);
  return button;
}

function made(tag, className) {
  return Object.assign(document.createElement(tag), { className });
}

// ---- conversations --------------------------------------------------------------------------------------------------

function keep(changed) {
  changed.changed = Date.now();
  if (!store.save(changed)) {
    changed.messages.at(-1).error = "The browser's storage is full: delete a conversation, or this one is lost on reload.";
  }
}

function showConversations() {
  const entries = store.conversations().map((stored) => {
    const entry = made("li", stored.id === conversation.id ? "current" : "");
    const open = made("button", "plain title");
    open.textContent = stored.title;
    open.addEventListener("click", () => switchTo(running?.conversation.id === stored.id ? running.conversation : stored));
    if (stored.id === conversation.id) open.setAttribute("aria-current", "true");
    const remove = made("button", "plain remove");
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Delete: ${stored.title}`);
    remove.addEventListener("click", () => removeConversation(stored));
    entry.append(open, remove);
    return entry;
  });
  byId("conversations").replaceChildren(...entries);
}

function switchTo(other) {
  conversation = other;
  closePanels();
  showAll();
  log.scrollTop = log.scrollHeight;
  prompt.focus();
}

function removeConversation(stored) {
  if (running?.conversation.id === stored.id) stop();
  store.remove(stored);
  if (stored.id === conversation.id) conversation = store.newConversation();
  showAll();
  (document.querySelector("#conversations .title") ?? byId("new")).focus();
}

// ---- sampling -------------------------------------------------------------------------------------------------------

function samplingIsValid() {
  const form = byId("sampling");
  if (!form.checkValidity()) byId("sampling-box").open = true;
  return form.reportValidity();
}

/** The fields of /generate; an empty one asks for what its placeholder says. */
function sampling() {
  const values = Object.fromEntries(new FormData(byId("sampling")));
  const number = (name, empty) => (values[name] === "" ? empty : Number(values[name]));
  return {
    temperature: number("temperature"),
    top_p: number("top_p"),
    top_k: number("top_k", -1),
    max_new_tokens: number("max_new_tokens", null),
    seed: number("seed", null),
  };
}

function setUpSampling() {
  const form = byId("sampling");
  for (const [name, value] of Object.entries(store.sampling())) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  form.addEventListener("input", () => store.saveSampling(Object.fromEntries(new FormData(form))));
  form.addEventListener("submit", (event) => event.preventDefault());
}

// ---- panels and keys ------------------------------------------------------------------------------------------------

function openPanel(id) {
  for (const panel of ["list", "live"]) {
    byId(panel).classList.toggle("open", panel === id);
    byId(`show-${panel}`).setAttribute("aria-expanded", String(panel === id));
  }
}

function closePanels() {
  openPanel(null);
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight + 2, 200)}px`;
}

function onKey(event) {
  if (event.key !== "Escape" || byId("key-dialog").open) return;
  const open = document.querySelector("#list.open, #live.open");
  if (open) {
    closePanels();
    byId(`show-${open.id}`).focus();
  } else {
    stop();
  }
}

function setUp() {
  for (const panel of ["list", "live"]) {
    byId(`show-${panel}`).addEventListener("click", () => openPanel(byId(panel).classList.contains("open") ? null : panel));
  }
  document.querySelector("main").addEventListener("click", closePanels);
  byId("new").addEventListener("click", () => switchTo(store.newConversation()));
  byId("stop").addEventListener("click", stop);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("input", fitPrompt);
  prompt.addEventListener("keydown", (event) => {
    // While an input method composes, Enter takes its suggestion.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", onKey);
  addEventListener("pagehide", () => running && keep(running.conversation));
  setUpSampling();
  showAll();
  watchServer();
  showModel();
  prompt.focus();
}

setUp();
