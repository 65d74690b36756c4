// The dialogs (settings, key) and the choice of colours.

import * as conversations from "./conversations.js";
import { hasKey, setKey } from "./stream.js";
import { say } from "./strings.js";

// Were these of type "submit", Enter would choose them: they come first.
for (const cancel of document.querySelectorAll("dialog .cancel")) {
  cancel.onclick = () => cancel.closest("dialog").close();
}

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

/** Let the settings button open its dialog; `defaults()` are the server's, as far as known. */
export function setUpSettings(defaults) {
  const dialog = document.getElementById("settings");
  const form = dialog.querySelector("form");
  const forget = document.getElementById("forget-key");
  document.getElementById("open-settings").onclick = () => {
    const values = conversations.settings();
    form.elements.system.value = values.system ?? "";
    for (const name of NUMBERS) {
      const known = defaults()[name];
      const shown = known === undefined ? "" : ` ${Number(known.toPrecision(6))}`;
      form.elements[name].value = values[name] ?? "";
      form.elements[name].placeholder = say("serverDefault") + shown;
    }
    forget.hidden = !hasKey();
    dialog.returnValue = "";
    dialog.showModal();
  };
  forget.onclick = () => {
    setKey("");
    forget.hidden = true;
  };
  dialog.onclose = () => {
    if (dialog.returnValue !== "save") return;
    const values = {};
    if (form.elements.system.value.trim()) values.system = form.elements.system.value;
    for (const name of NUMBERS) {
      const number = form.elements[name].valueAsNumber;
      if (!Number.isNaN(number)) values[name] = number;
    }
    conversations.saveSettings(values);
  };
}

/** Ask the reader for the server's key; true when there is one. */
export function askKey() {
  const dialog = document.getElementById("ask-key");
  const input = dialog.querySelector("input");
  document.getElementById("key-more").textContent = say(hasKey() ? "keyWrong" : "keyMore");
  input.value = "";
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "save";
      if (given) setKey(input.value.trim());
      resolve(given);
    }, { once: true });
  });
}

/** Let the button change between light and dark, and show which comes next. */
export function setUpTheme() {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => { button.textContent = isDark() ? "☀" : "☾"; };
  button.onclick = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("megrez.theme", root.dataset.theme);
    } catch {
      // It lasts as long as the page.
    }
    show();
    root.dispatchEvent(new Event("themechange"));
  };
  system.onchange = () => {
    show();
    root.dispatchEvent(new Event("themechange"));
  };
  show();
}
