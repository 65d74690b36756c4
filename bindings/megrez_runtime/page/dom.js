// Making elements. Text goes in as text nodes, never as HTML.

import { say } from "./strings.js";

/** An element with properties and children; a child is a node or a string. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** A button that says `name` (of strings.js) and does `act`. */
export function button(name, act, className = "") {
  return element("button", { type: "button", className, textContent: say(name), onclick: act });
}

/** Whether a key is the input method's, as the Enter that ends a composition. */
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Enter without Shift. */
export function isSubmit(event) {
  return event.key === "Enter" && !event.shiftKey && !isComposing(event);
}

/** Enter in `field` calls finish(true), Escape finish(false). */
export function onFinish(field, finish) {
  field.addEventListener("keydown", (event) => {
    const submits = isSubmit(event);
    if (!submits && (event.key !== "Escape" || isComposing(event))) return;
    // Or Enter would press the button that has the focus next, and Escape stop the answer.
    event.preventDefault();
    event.stopPropagation();
    finish(submits);
  });
}

/** A text area as high as its text; style.css limits it. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

/** Put `text` on the clipboard and say so on the button `told` for a moment. */
export async function copy(text, told) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
  } else {
    copyFromSelection(text);
  }
  told.textContent = say("copied");
  setTimeout(() => { told.textContent = say("copy"); }, 1500);
}

// navigator.clipboard exists for https and localhost only; teams reach this page over http.
function copyFromSelection(text) {
  const area = element("textarea", { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
