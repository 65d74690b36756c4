// The list of conversations: choose, rename, delete.

import { button, element, onFinish } from "./dom.js";
import { say } from "./strings.js";

export class Sidebar {
  #list = document.getElementById("conversations");
  #menu = document.getElementById("menu");
  #actions;

  /** `actions` has open(id), rename(id, title), remove(id), create(). */
  constructor(actions) {
    this.#actions = actions;
    document.getElementById("new").onclick = () => {
      this.toggle(false);
      actions.create();
    };
    document.getElementById("shade").onclick = () => this.toggle(false);
    this.#menu.onclick = () => this.toggle(!this.isOpen);
  }

  /** Show the conversations, the one called `current` as chosen. */
  show(conversations, current) {
    const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
    this.#list.replaceChildren(...conversations.map((each) => this.#entry(each, each.id === current)));
    if (focused) this.#list.querySelector(`[data-id="${focused}"] .open`)?.focus();
  }

  /** On a narrow screen: slide it in or out. */
  toggle(open) {
    document.body.classList.toggle("with-sidebar", open);
    this.#menu.setAttribute("aria-expanded", String(open));
  }

  get isOpen() {
    return document.body.classList.contains("with-sidebar");
  }

  #entry({ id, title }, isCurrent) {
    const open = element("button", { type: "button", className: "open", title, textContent: title });
    if (isCurrent) open.setAttribute("aria-current", "true");
    open.onclick = () => {
      this.toggle(false);
      this.#actions.open(id);
    };
    const rename = small("rename", "✎", title, () => this.#rename(entry, id, title));
    const remove = small("delete", "✕", title, () => this.#actions.remove(id));
    const entry = element("li", {}, open, rename, remove);
    entry.dataset.id = id;
    return entry;
  }

  #rename(entry, id, title) {
    const input = element("input", { value: title });
    input.setAttribute("aria-label", say("rename"));
    let done = false;
    const finish = (keep) => {
      if (done) return;
      done = true;
      this.#actions.rename(id, (keep && input.value.trim()) || title);
    };
    onFinish(input, finish);
    input.onblur = () => finish(true);
    entry.replaceChildren(input);
    input.focus();
    input.select();
  }
}

function small(name, sign, title, act) {
  const made = button(name, act, "icon small");
  made.textContent = sign;
  made.title = say(name);
  made.setAttribute("aria-label", `${say(name)}: ${title}`);
  return made;
}
