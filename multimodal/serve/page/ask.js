// The tab "Ask": a question about a picture. The answer appears while it is written.

import { code } from "./code.js";
import { $, GrowingText, count, make, works } from "./dom.js";
import { readPicture, receives } from "./pictures.js";
import { options } from "./settings.js";
import { Problem, stream } from "./server.js";

const panel = $("ask");
let picture = null;

const work = works(panel, async (signal) => {
  const question = $("question").value.trim();
  if (!question && !picture) throw new Problem("Choose a picture, or write a question.");
  const content = [];
  if (picture) content.push({ type: "image_url", image_url: { url: picture } });
  if (question) content.push({ type: "text", text: question });
  const { model, ...more } = options("temperature", "seed", "max_tokens");
  const messages = [{ role: "user", content }];
  const body = { model, messages, ...more, stream: true, stream_options: { include_usage: true } };
  await answer({ path: "chat/completions", body }, question || "Caption", signal);
});

async function answer(request, question, signal) {
  const text = make("p", { className: "text" });
  const note = make("p", { className: "note" }, "waits");
  const words = make("div", {}, make("h2", {}, question), text, note, code(request));
  const entry = make("article", { className: "entry" }, words);
  if (picture) entry.prepend(make("img", { src: picture.uri, alt: picture.name }));
  $("answers").prepend(entry);
  const growing = new GrowingText(text);
  const start = performance.now();
  let ended = "failed";
  let tokens = "";
  try {
    for await (const { choices, usage } of stream(request, signal)) {
      note.textContent = "writes";
      for (const { delta, finish_reason } of choices) {
        growing.add(delta.content ?? "");
        ended = finish_reason ?? ended;
      }
      if (usage) tokens = `${count(usage.completion_tokens, "token")}, `;
    }
    if (!text.textContent.trim()) text.append(make("i", {}, "The answer is empty."));
  } finally {
    growing.end();
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    if (signal.aborted) ended = "stopped";
    const why = { length: "cut at the longest length, ", stopped: "stopped, ", failed: "failed, ",
      content_filter: "filtered, " }[ended] ?? "";
    note.textContent = `${tokens}${why}${seconds} s`;
  }
}

/** Ask about this picture. */
export function showPicture(given) {
  picture = given;
  const image = $("ask-picture");
  image.src = picture.uri;
  image.alt = picture.name;
  image.hidden = false;
  work.clear();
}

receives(panel, [$("ask-file")], async ([file]) => {
  try {
    showPicture(await readPicture(file));
    $("question").focus();
  } catch (error) {
    work.fail(error.message);
  }
});
