// A drawing that appears in the results of a tab, and what can be done with it then.

import { code } from "./code.js";
import { make, say } from "./dom.js";
import { Picture, give } from "./pictures.js";
import { stream } from "./server.js";

/**
 * Send a request that draws, and show the drawing as it grows, on top of the results.
 * request: see server.js; its answer is a stream. downloads: further Pictures to save.
 * Returns the Picture.
 */
export async function showDrawing(results, request, signal, downloads = []) {
  const { prompt, seed } = request.body ?? request.form;
  const image = make("img", { className: "waits", alt: `Drawing: ${prompt}` });
  const note = make("p", { className: "note" }, "waits");
  const words = make("div", {}, make("h2", {}, prompt), note);
  const entry = make("article", { className: "entry large" }, image, words);
  results.prepend(entry);
  const start = performance.now();
  let picture = null;
  let shown = 0;
  try {
    for await (const event of stream(request, signal)) {
      const drawn = await Picture.fromBase64(event.b64_json, `drawing-${seed}.png`);
      image.src = drawn.uri;
      if (event.type.endsWith(".completed")) picture = drawn;
      else note.textContent = `draws: preview ${++shown}`;
    }
  } finally {
    image.classList.remove("waits");
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    note.textContent = `${picture ? "" : "not finished, "}seed ${seed}, ${seconds} s`;
    if (!image.src) image.remove();
    if (picture) words.append(actions([picture, ...downloads]));
    words.append(code(request));
  }
  say(`The drawing is finished: ${prompt}`);
  return picture;
}

function actions(pictures) {
  const line = make("div", { className: "line" });
  for (const { blob, name } of pictures)
    line.append(make("a", { href: URL.createObjectURL(blob), download: name }, `Save ${name}`));
  for (const [panel, text] of [["ask", "Ask about it"], ["edit", "Edit it"]]) {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", () => give(panel, pictures[0]));
    line.append(button);
  }
  return line;
}
