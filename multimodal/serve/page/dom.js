// Pieces of the page that all tabs use: elements, what is said aloud, work that can be stopped.

import { Problem } from "./server.js";

export const $ = (id) => document.getElementById(id);

/** An element with properties and children. Texts are never read as HTML. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

/** Said by screen readers. A text that is said again is a change, too. */
export function say(text) {
  const said = $("said");
  said.replaceChildren();
  said.append(make("span", {}, text));
}

/** A text that arrives in pieces: seen at once, said aloud sentence by sentence. */
export class GrowingText {
  constructor(element) {
    this.node = element.appendChild(document.createTextNode(""));
    this.unsaid = "";
  }

  add(piece) {
    this.node.appendData(piece);
    this.unsaid += piece;
    const end = this.unsaid.search(/[.!?:;]\s/);
    if (end >= 0) {
      say(this.unsaid.slice(0, end + 1));
      this.unsaid = this.unsaid.slice(end + 1);
    }
  }

  end() {
    if (this.unsaid.trim()) say(this.unsaid);
    this.unsaid = "";
  }
}

/**
 * A tab's form does work that a person can stop, by its button or by Escape.
 * Errors are shown in words below the form.
 * run: gets an AbortSignal.
 */
export function works(panel, run) {
  const form = panel.querySelector("form");
  const go = form.querySelector(".go");
  const stop = make("button", { type: "button", className: "stop", hidden: true }, "Stop");
  const error = make("p", { className: "error", role: "alert" });
  go.after(stop);
  form.append(error);
  let working = null;

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (working) return;
    working = new AbortController();
    error.textContent = "";
    busy(true);
    try {
      await run(working.signal);
    } catch (reason) {
      if (working.signal.aborted) say("Stopped.");
      else if (reason instanceof Problem) error.textContent = reason.message;
      else {
        error.textContent = "The page failed. The console of the browser says why.";
        console.error(reason);
      }
    }
    working = null;
    busy(false);
  });

  function busy(is) {
    const hadFocus = document.activeElement === stop;
    panel.setAttribute("aria-busy", is);
    go.setAttribute("aria-disabled", is);
    stop.hidden = !is;
    if (hadFocus && !is) go.focus();
  }

  const halt = () => working?.abort();
  stop.addEventListener("click", halt);
  panel.addEventListener("keydown", (event) => event.key === "Escape" && halt());
  return { fail: (text) => (error.textContent = text), clear: () => (error.textContent = "") };
}

/** A text to copy, with a button. */
export function copyable(title, text) {
  const pre = make("pre", { tabIndex: 0 }, text);
  pre.setAttribute("aria-label", title);
  const button = make("button", { type: "button" }, "Copy");
  button.setAttribute("aria-label", `Copy ${title}`);
  button.addEventListener("click", async () => {
    const copied = await copy(text, pre);
    button.textContent = copied ? "Copied" : "Selected";
    say(copied ? "Copied." : "Selected: copy it with the keyboard.");
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return make("div", { className: "code" }, make("div", { className: "line" }, title, button), pre);
}

/** navigator.clipboard exists on https and on this machine only. */
async function copy(text, shown) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(shown);
    return document.execCommand("copy");
  }
}
