// The conversation on the screen: its messages and what can be done with each.

import { button, copy, element, grow, onFinish } from "./dom.js";
import { render } from "./markdown.js";
import { number, say } from "./strings.js";

/** How near its end, in pixels, a reader counts as being there. */
const NEAR = 48;

export class Thread {
  #root = document.getElementById("thread");
  #scroller = document.getElementById("scroller");
  #toEnd = document.getElementById("to-end");
  #welcome = document.getElementById("welcome");
  #views = new Map();
  #following = true;
  #actions;

  /** `actions` has resend(message, text), regenerate(message), goOn(message), restore(). */
  constructor(actions) {
    this.#actions = actions;
    this.#scroller.addEventListener("scroll", () => this.#look());
    this.#toEnd.onclick = () => this.follow();
    new ResizeObserver(() => this.#keepUp()).observe(this.#scroller);
  }

  /** Show these messages; `running` is the one that is being written, if any. */
  show(messages, running) {
    this.#welcome.hidden = messages.length > 0;
    for (const [message, view] of this.#views) {
      if (messages.includes(message)) continue;
      view.root.remove();
      this.#views.delete(message);
    }
    messages.forEach((message, index) => {
      const last = index === messages.length - 1;
      this.update(message, message === running, last);
    });
    this.#keepUp();
  }

  /** Show a message as it is now. */
  update(message, isRunning, isLast) {
    const view = this.#views.get(message) ?? this.#add(message);
    view.root.classList.toggle("running", isRunning);
    view.root.setAttribute("aria-busy", String(isRunning));
    if (view.editing) return;
    if (message.role === "user") view.body.textContent = message.content;
    else render(view.body, message.content, isRunning);
    this.#tell(view, message, isRunning, isLast);
    this.#keepUp();
  }

  /** Scroll to the end, and stay there as the answer grows. */
  follow() {
    this.#following = true;
    this.#keepUp();
  }

  edit(message) {
    this.#startEditing(this.#views.get(message), message);
  }

  #add(message) {
    const view = {
      root: element("article", { className: `message ${message.role}` }),
      body: element("div", { className: "body" }),
      note: element("div", { className: "note" }),
      actions: element("div", { className: "actions" }),
      state: null,
      editing: false,
    };
    view.root.append(view.body, view.note, view.actions);
    this.#root.append(view.root);
    this.#views.set(message, view);
    return view;
  }

  #tell(view, message, isRunning, isLast) {
    const { ending, error, tokens, rate } = message;
    const state = JSON.stringify([isRunning, isLast, ending, error, tokens, rate]);
    if (state === view.state) return;
    view.state = state;
    view.note.replaceChildren(...note(message, isRunning));
    view.note.classList.toggle("error", Boolean(error) && error.kind !== "loading");
    view.actions.replaceChildren(...(isRunning ? [] : this.#buttons(view, message, isLast)));
  }

  #buttons(view, message, isLast) {
    const copying = button("copy", () => copy(message.content, copying));
    if (message.role === "user") {
      return [copying, button("edit", () => this.#startEditing(view, message))];
    }
    const buttons = message.content ? [copying] : [];
    const again = message.error ? "retry" : "regenerate";
    if (isLast && message.content && message.ending !== "stop") {
      buttons.push(button("continue", () => this.#actions.goOn(message)));
    }
    if (isLast) buttons.push(button(again, () => this.#actions.regenerate(message)));
    if (message.tokens) buttons.push(element("span", { className: "speed" }, speed(message)));
    return buttons;
  }

  #startEditing(view, message) {
    if (view.editing) return;
    view.editing = true;
    const area = element("textarea", { value: message.content, rows: 1 });
    area.setAttribute("aria-label", say("edit"));
    const finish = (send) => {
      view.editing = false;
      view.state = null;
      const text = area.value.trim();
      if (send && text) this.#actions.resend(message, text);
      else this.#actions.restore();
    };
    const cancel = button("cancel", () => finish(false));
    area.oninput = () => grow(area);
    onFinish(area, finish);
    view.body.replaceChildren(area);
    view.actions.replaceChildren(cancel, button("send", () => finish(true), "primary"));
    grow(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  // --- scrolling ---

  #look() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    this.#following = scrollHeight - scrollTop - clientHeight < NEAR;
    this.#toEnd.hidden = this.#following;
  }

  #keepUp() {
    if (this.#following) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    else this.#look();
  }
}

function note({ error, ending, content }, isRunning) {
  if (error) return [say(error.kind, error.values)];
  if (isRunning) {
    return content ? [] : [element("span", { className: "dots", ariaLabel: say("answering") })];
  }
  if (ending === "length" || ending === "stopped") return [say(ending)];
  return [];
}

function speed({ tokens, rate }) {
  const count = say("tokens", { count: number(tokens) });
  return rate ? `${count} · ${say("perSecond", { rate: number(rate, 1) })}` : count;
}
