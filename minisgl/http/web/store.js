// Conversations and sampling settings in the browser's own storage. One entry a conversation, so that two tabs do not
// overwrite each other's.

const PREFIX = "minisgl.chat.";
const SAMPLING = "minisgl.sampling";
const SAMPLING_DEFAULTS = { temperature: "0.7", top_p: "0.95", top_k: "", max_new_tokens: "1024", seed: "" };

/** A conversation is `{id, title, changed, messages}`; a message is `{role, content, note, error}`. */
export function newConversation() {
  return { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, title: "New chat", changed: 0, messages: [] };
}

/** All that are stored, the latest first. */
export function conversations() {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  const stored = keys.map((key) => parsed(localStorage.getItem(key))).filter((entry) => Array.isArray(entry?.messages));
  return stored.sort((one, other) => other.changed - one.changed);
}

/** Whether it could be stored; browsers keep some megabytes a site. */
export function save(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  if (first) conversation.title = first.content.trim().replace(/\s+/g, " ").slice(0, 80);
  return stored(PREFIX + conversation.id, conversation);
}

export function remove(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}

export function sampling() {
  return { ...SAMPLING_DEFAULTS, ...parsed(localStorage.getItem(SAMPLING)) };
}

export function saveSampling(values) {
  stored(SAMPLING, values);
}

function stored(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
