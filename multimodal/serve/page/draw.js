// The tab "Draw": a text becomes a drawing.

import { showDrawing } from "./drawing.js";
import { $, works } from "./dom.js";
import { options } from "./settings.js";

const OPTIONS = ["temperature", "seed", "guidance_scale", "steps", "negative_prompt"];
const PREVIEWS = 3; // the most that OpenAI's API knows

works($("draw"), async (signal) => {
  const { model, ...more } = options(...OPTIONS);
  const prompt = $("prompt").value.trim();
  const body = { model, prompt, ...more, stream: true, partial_images: PREVIEWS };
  await showDrawing($("drawings"), { path: "images/generations", body }, signal);
});
