// The settings below the tabs: the model, and options of requests. Empty fields are not sent.

import { $ } from "./dom.js";
import { Problem, ask } from "./server.js";

const NUMBERS = ["temperature", "seed", "max_tokens", "guidance_scale", "steps"];

/** Fill the list of models. Raises Problem. */
export async function loadModels() {
  const { data } = await ask({ path: "models" });
  const chosen = $("model").value;
  $("model").replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
  $("served").textContent = data.map(({ id }) => id).join(", ");
}

/**
 * The model and the options of these names that a person has set. Without a seed there is a random
 * one, so that the same request can be sent again.
 * Raises Problem for a value out of range.
 */
export function options(...names) {
  const wrong = names.map($).find((field) => !field.checkValidity());
  if (wrong) {
    $("settings").open = true;
    wrong.reportValidity();
    throw new Problem(`A setting is out of range: ${wrong.labels[0].firstChild.data.trim()}.`);
  }
  const found = { model: $("model").value };
  if (!found.model) throw new Problem("The server has not said which model it has.");
  for (const name of names) {
    const text = $(name).value.trim();
    if (text) found[name] = NUMBERS.includes(name) ? Number(text) : text;
    else if (name === "seed") found.seed = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  }
  return found;
}
