// The page's controller: what the reader does becomes requests, what arrives becomes messages.

import * as conversations from "./conversations.js";
import { button, element, grow, isComposing, isSubmit } from "./dom.js";
import { Panel } from "./panel.js";
import { askKey, setUpSettings, setUpTheme } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { answer, ApiError, get } from "./stream.js";
import { say, translate } from "./strings.js";
import { Thread } from "./thread.js";

const $ = (id) => document.getElementById(id);
/** How often a growing answer is saved, and how soon a server that loads is asked again. */
const PERIOD = 1000;
const TITLE = 80;

translate(document);

let current = conversations.create();
/** By conversation's id: {conversation, message, controller}. */
const runs = new Map();
const server = { model: "", context: 0, defaults: {} };

const thread = new Thread({ resend, regenerate, goOn, restore: show });
const sidebar = new Sidebar({ open, rename, remove, create: () => choose(conversations.create()) });
const panel = new Panel($("panel"), $("toggle-panel"));
setUpSettings(() => server.defaults);
setUpTheme();

// --- showing ---

function show() {
  const run = runs.get(current.id);
  thread.show(current.messages, run?.message);
  sidebar.show(conversations.all(), current.id);
  $("title").textContent = current.title || say("newChat");
  document.title = current.title ? `${current.title} · Megrez` : "Megrez";
  $("send").hidden = run !== undefined;
  $("stop").hidden = run === undefined;
}

function choose(conversation) {
  current = conversation;
  history.replaceState(null, "", conversation.messages.length > 0 ? `#${conversation.id}` : "#");
  show();
  thread.follow();
  $("input").focus();
}

function notice(text, ...buttons) {
  const close = button("close", () => notice(""));
  $("notice").hidden = !text;
  $("notice").replaceChildren(element("span", {}, text), ...buttons, close);
}

function announce(text) {
  $("status").textContent = text;
}

// --- conversations ---

function open(id) {
  const conversation = runs.get(id)?.conversation ?? conversations.load(id);
  if (conversation) choose(conversation);
}

function save(conversation) {
  conversation.changed = Date.now();
  if (!conversations.save(conversation)) notice(say("full"));
}

function rename(id, title) {
  const conversation = id === current.id ? current : runs.get(id)?.conversation ?? conversations.load(id);
  if (conversation && conversation.title !== title) {
    conversation.title = title;
    save(conversation);
  }
  show();
}

async function remove(id) {
  await stop(id);
  const removed = id === current.id ? current : conversations.load(id);
  conversations.remove(id);
  notice(say("deleted"), button("undo", () => {
    notice("");
    save(removed);
    choose(removed);
  }));
  if (id === current.id) choose(conversations.create());
  else show();
}

// --- asking ---

function send() {
  const text = $("input").value.trim();
  if (!text || runs.has(current.id)) return;
  $("input").value = "";
  grow($("input"));
  notice("");
  current.messages.push({ role: "user", content: text });
  current.title ||= Array.from(text.split("\n")[0]).slice(0, TITLE).join("");
  reply(current);
}

/** The user said something else: what followed is gone. */
async function resend(message, text) {
  await stop(current.id);
  message.content = text;
  current.messages.splice(current.messages.indexOf(message) + 1);
  reply(current);
}

function regenerate(message) {
  current.messages.splice(current.messages.indexOf(message));
  reply(current);
}

function goOn(message) {
  run(current, message);
}

function reply(conversation) {
  const message = { role: "assistant", content: "" };
  conversation.messages.push(message);
  run(conversation, message);
}

/** Stop the answer to this conversation, if there is one; what had arrived is kept. */
async function stop(id) {
  const run = runs.get(id);
  run?.controller.abort();
  await run?.done;
}

/** Let the model write `message`, or go on with it. */
function run(conversation, message) {
  const { id } = conversation;
  const controller = new AbortController();
  Object.assign(message, { ending: undefined, error: undefined });
  const started = { conversation, message, controller };
  runs.set(id, started);
  history.replaceState(null, "", `#${id}`);
  started.done = finish(started);
  show();
  thread.follow();
  announce(say("answering"));
}

async function finish({ conversation, message, controller }) {
  const { id } = conversation;
  const free = await conversations.alone(id, () => write(conversation, message, controller.signal));
  runs.delete(id);
  if (!free) giveBack(conversation);
  if (id !== current.id) return;
  show();
  announce(message.error ? say(message.error.kind, message.error.values) : message.content);
}

/** Another tab is at it: go back to what that one has saved. */
function giveBack(conversation) {
  notice(say("anotherTab"));
  const saved = conversations.load(conversation.id);
  const lost = conversation.messages.findLast(({ role }) => role === "user").content;
  if (!saved.messages.some(({ content }) => content === lost)) $("input").value ||= lost;
  adopt(conversation, saved);
}

/** Take over what another tab saved; messages stay the same objects, so the screen stays still. */
function adopt(conversation, { title, messages }) {
  conversation.title = title;
  conversation.messages = messages.map((message, index) => {
    const here = conversation.messages[index];
    if (here?.role !== message.role) return message;
    return Object.assign(here, { ending: undefined, error: undefined }, message);
  });
}

async function write(conversation, message, signal) {
  const painter = new Painter(conversation, message);
  save(conversation);
  sidebar.show(conversations.all(), current.id);
  try {
    for (;;) {
      try {
        for await (const event of answer(request(conversation), signal)) {
          painter.take(event);
        }
        return;
      } catch (error) {
        if (!(await canRetry(error, message, signal))) throw error;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") {
      Object.assign(message, { ending: "stopped", error: undefined });
    } else if (error instanceof ApiError) {
      message.error = { kind: error.kind, values: error.values };
      message.ending = message.content ? "broken" : undefined;
    } else {
      throw error;
    }
  } finally {
    painter.finish();
    save(conversation);
  }
}

/** Wait for a server that loads, ask for a key that is missing; true to try again. */
async function canRetry(error, message, signal) {
  if (error.kind === "keyNeeded") return askKey();
  if (error.kind !== "loading") return false;
  message.error = { kind: "loading" };
  if (runs.get(current.id)?.message === message) thread.update(message, true, true);
  await pause(signal);
  message.error = undefined;
  return true;
}

function pause(signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, PERIOD);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

function request(conversation) {
  const { system, ...sampling } = conversations.settings();
  // An answer that has begun goes on; one that has not, or that failed, is not sent.
  const said = conversation.messages.filter(({ content }) => content !== "");
  const messages = said.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  return {
    model: server.model || "megrez-moe",
    messages,
    stream: true,
    stream_options: { include_usage: true },
    timings_per_token: true,
    ...sampling,
  };
}

/** Takes a stream's events into a message; shows it once a frame, and saves it once a second. */
class Painter {
  #conversation;
  #message;
  #frame = 0;
  #saved = Date.now();
  #earlier;

  constructor(conversation, message) {
    this.#conversation = conversation;
    this.#message = message;
    this.#earlier = message.tokens ?? 0;
  }

  take({ choices, timings, usage }) {
    const message = this.#message;
    const choice = choices?.[0];
    message.content += choice?.delta?.content ?? "";
    if (choice?.finish_reason) message.ending = choice.finish_reason;
    if (usage) message.tokens = this.#earlier + usage.completion_tokens;
    if (timings) {
      if (timings.predicted_n > 1) message.rate = timings.predicted_per_second;
      panel.speed(timings, server.context);
    }
    this.#frame ||= requestAnimationFrame(() => this.#paint());
    if (Date.now() - this.#saved > PERIOD) {
      this.#saved = Date.now();
      save(this.#conversation);
    }
  }

  finish() {
    cancelAnimationFrame(this.#frame);
  }

  #paint() {
    this.#frame = 0;
    if (this.#conversation.id === current.id) thread.update(this.#message, true, true);
  }
}

// --- the reader's hands ---

$("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("stop").onclick = () => {
  runs.get(current.id)?.controller.abort();
  $("input").focus();
};
$("input").oninput = () => grow($("input"));
$("input").onkeydown = (event) => {
  if (isSubmit(event)) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && $("input").value === "") {
    const last = current.messages.findLast(({ role }) => role === "user");
    if (last && !runs.has(current.id)) {
      event.preventDefault();
      thread.edit(last);
    }
  }
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || isComposing(event) || document.querySelector("dialog[open]")) return;
  if (sidebar.isOpen) sidebar.toggle(false);
  else runs.get(current.id)?.controller.abort();
});
window.addEventListener("pagehide", () => {
  for (const { conversation } of runs.values()) save(conversation);
});
conversations.watch((id) => {
  if (id === current.id && !runs.has(id)) {
    const saved = conversations.load(id);
    if (saved) adopt(current, saved);
    else current = conversations.create();
  }
  show();
});

// --- the server ---

/** Learn what the server tells of itself; ask again while it loads or wants a key. */
async function connect() {
  for (let told = false; ; told = true) {
    try {
      const { data } = await get("v1/models");
      if (told) notice("");
      server.model = data[0].id;
      server.context = data[0].meta?.n_ctx ?? 0;
      $("model").textContent = server.model;
      await learnDefaults();
      await panel.offer();
      return;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.kind === "keyNeeded" && await askKey()) continue;
      notice(say(error.kind, error.values), button("retry", () => {
        notice("");
        connect();
      }));
      if (error.kind !== "loading") return;
      await pause();
    }
  }
}

/** /props may be closed, and then the server's defaults stay unknown. */
async function learnDefaults() {
  try {
    const { default_generation_settings: known } = await get("props");
    server.context = known.n_ctx ?? server.context;
    const { temperature, top_p } = known.params ?? {};
    Object.assign(server.defaults, { temperature, top_p });
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
  }
}

if (!conversations.isKept()) notice(say("noStorage"));
const linked = conversations.load(location.hash.slice(1));
choose(linked ?? current);
connect();
