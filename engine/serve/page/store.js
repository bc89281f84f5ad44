// Conversations and settings in this browser. Every conversation has a key of its own, so that two tabs do not overwrite
// each other's.

const PREFIX = "gguf-engine/";
const ONE = PREFIX + "conversation/";

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch { // written by something else, or no storage is allowed
    return null;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function keys() {
  try {
    return Object.keys(localStorage);
  } catch { // a browser that lets pages keep nothing
    return [];
  }
}

/** All conversations, the last changed first. */
export function conversations() {
  const found = [];
  for (const key of keys()) {
    const value = key.startsWith(ONE) ? read(key) : null;
    if (isConversation(value)) found.push(value);
  }
  return found.sort((a, b) => b.changed - a.changed);
}

function isConversation(value) {
  return value !== null && typeof value === "object" && typeof value.id === "string" && Array.isArray(value.messages);
}

/** One of them; null where it is not there any more. */
export function conversation(id) {
  const value = read(ONE + id);
  return isConversation(value) ? value : null;
}

/** A new conversation of a kind, "chat" or "text"; kept once something is in it. */
export function begin(kind) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, kind, messages: [], text: "", last: null, changed: Date.now() };
}

/** Keep a conversation; false where the browser's storage is full. */
export function keep(one) {
  return write(ONE + one.id, one);
}

export function remove(id) {
  try {
    localStorage.removeItem(ONE + id);
  } catch {} // nothing was kept
}

/** A conversation's title: how it begins. */
export function title(one) {
  const text = one.kind === "text" ? one.text : one.messages.find((message) => message.role === "user")?.content ?? "";
  return text.trim().replace(/\s+/g, " ").slice(0, 80) || (one.kind === "text" ? "New text" : "New chat");
}

export function settings() {
  return { system: "", stop: "", key: "", theme: "", model: "", ...read(PREFIX + "settings") };
}

export function keepSettings(value) {
  return write(PREFIX + "settings", value);
}

/** Call a function when another tab changed something. */
export function onChange(call) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) call(event.key?.startsWith(ONE) ? event.key.slice(ONE.length) : null);
  });
}
