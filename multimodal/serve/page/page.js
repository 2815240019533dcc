// The page: tabs, the API key, and the list of models. Each tab has a file of its own.

import { $, say } from "./dom.js";
import { key, wants } from "./server.js";
import { loadModels } from "./settings.js";
import "./ask.js";
import "./draw.js";
import "./edit.js";
import "./search.js";

const tabs = [...document.querySelectorAll('[role="tab"]')];
const names = tabs.map((tab) => tab.getAttribute("aria-controls"));

function showTab(name) {
  const chosen = names.includes(name) ? name : names[0];
  document.body.dataset.tab = chosen;
  for (const tab of tabs) {
    const is = tab.getAttribute("aria-controls") === chosen;
    tab.setAttribute("aria-selected", is);
    tab.tabIndex = is ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !is;
  }
  if (location.hash.slice(1) !== chosen) history.replaceState(null, "", `#${chosen}`);
}

for (const [number, tab] of tabs.entries()) {
  tab.addEventListener("click", () => showTab(names[number]));
  tab.addEventListener("keydown", (event) => {
    const last = tabs.length - 1;
    const next = {
      ArrowLeft: number ? number - 1 : last, ArrowRight: number < last ? number + 1 : 0,
      Home: 0, End: last,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    showTab(names[next]);
    tabs[next].focus();
  });
}
window.addEventListener("hashchange", () => showTab(location.hash.slice(1)));
showTab(location.hash.slice(1));

async function start() {
  try {
    await loadModels();
    $("keys").hidden = true;
  } catch (error) {
    $("served").textContent = error.message;
  }
}

wants.key = () => {
  if ($("keys").hidden || key.value) say("The server asks for an API key.");
  $("keys").hidden = false;
  $("key").focus();
};
$("keys").addEventListener("submit", (event) => {
  event.preventDefault();
  key.value = $("key").value.trim();
  $("key").value = "";
  start();
});
start();
