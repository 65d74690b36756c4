// Conversations and settings in the browser's storage.
//
// Each conversation has a key of its own, so tabs that work on different ones never overwrite each
// other's. {id, title, changed, messages: [{role, content, ending, error, rate, tokens}]}

const PREFIX = "megrez.conversation.";
const SETTINGS = "megrez.settings";

let storage = null;
try {
  storage = window.localStorage;
} catch {
  // Forbidden: everything lasts as long as the page.
}

const unsaved = new Map();

export function isKept() {
  return storage !== null;
}

/** A new conversation, which is saved with its first message. */
export function create() {
  const id = `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
  return { id, title: "", changed: Date.now(), messages: [] };
}

/** All of them, the newest first. */
export function all() {
  const found = new Map(unsaved);
  for (let index = 0; index < (storage?.length ?? 0); index += 1) {
    const key = storage.key(index);
    if (!key.startsWith(PREFIX)) continue;
    const conversation = parse(storage.getItem(key));
    if (conversation && !found.has(conversation.id)) found.set(conversation.id, conversation);
  }
  return [...found.values()].sort((one, other) => other.changed - one.changed);
}

export function load(id) {
  return unsaved.get(id) ?? parse(storage?.getItem(PREFIX + id) ?? null);
}

/** Keep it; false if the browser's storage is full, and it lasts as long as the page. */
export function save(conversation) {
  try {
    storage?.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    if (storage) unsaved.delete(conversation.id);
    else unsaved.set(conversation.id, conversation);
    return true;
  } catch {
    unsaved.set(conversation.id, conversation);
    return false;
  }
}

export function remove(id) {
  unsaved.delete(id);
  storage?.removeItem(PREFIX + id);
}

/** Call `changed(id)` when another tab changes, or removes, a conversation. */
export function watch(changed) {
  window.addEventListener("storage", (event) => {
    if (event.key === null) changed(null);
    else if (event.key.startsWith(PREFIX)) changed(event.key.slice(PREFIX.length));
  });
}

/**
 * Run `work` while no other tab does for this conversation; false if one does. Browsers have locks
 * for https and localhost only; elsewhere the last to save wins.
 */
export async function alone(id, work) {
  if (!navigator.locks) {
    await work();
    return true;
  }
  return navigator.locks.request(PREFIX + id, { ifAvailable: true }, async (lock) => {
    if (lock) await work();
    return lock !== null;
  });
}

/** {system, temperature, top_p, max_tokens, seed}; what is absent is left to the server. */
export function settings() {
  return parse(storage?.getItem(SETTINGS) ?? null) ?? {};
}

export function saveSettings(values) {
  try {
    storage?.setItem(SETTINGS, JSON.stringify(values));
    return true;
  } catch {
    return false;
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
