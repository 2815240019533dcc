// The tab "Edit": a person paints over a part of a picture, and the model draws it anew.

import { showDrawing } from "./drawing.js";
import { $, make, say, works } from "./dom.js";
import { Picture, readPicture, receives } from "./pictures.js";
import { options } from "./settings.js";
import { Problem } from "./server.js";

const OPTIONS = ["temperature", "seed", "guidance_scale", "steps", "negative_prompt"];
const panel = $("edit");
const brush = $("brush"); // opaque where painted, with as many pixels as the picture
const context = brush.getContext("2d", { willReadFrequently: true });
const cursor = $("cursor");
let picture = null;
let painted = false;
let at = null; // the brush, in pixels of the picture

const work = works(panel, async (signal) => {
  if (!picture) throw new Problem("Choose a picture first.");
  if (!painted) throw new Problem("Paint over the part that is to be drawn anew.");
  const form = { prompt: $("change").value.trim(), ...options(...OPTIONS), stream: "true" };
  const files = { image: picture, mask: await mask() };
  await showDrawing($("edits"), { path: "images/edits", form, files }, signal, [files.mask]);
});

/** The mask of the API: transparent where to draw, black elsewhere. */
async function mask() {
  const canvas = make("canvas", { width: brush.width, height: brush.height });
  const drawing = canvas.getContext("2d");
  drawing.fillRect(0, 0, canvas.width, canvas.height);
  drawing.globalCompositeOperation = "destination-out";
  drawing.drawImage(brush, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return Picture.of(blob, "mask.png");
}

const width = () => ($("brush-size").value / 100) * Math.max(brush.width, brush.height);

/** Paint from where the brush is to a point, in pixels of the picture. */
function paint(x, y) {
  context.fillStyle = context.strokeStyle = getComputedStyle(brush).color;
  context.lineWidth = width();
  context.beginPath();
  context.moveTo(at?.x ?? x, at?.y ?? y);
  context.lineTo(x, y);
  context.stroke();
  context.beginPath();
  context.arc(x, y, width() / 2, 0, 2 * Math.PI);
  context.fill();
  painted = true;
}

function moveTo(x, y) {
  at = { x: Math.min(Math.max(x, 0), brush.width), y: Math.min(Math.max(y, 0), brush.height) };
  const scale = brush.clientWidth / brush.width;
  cursor.hidden = false;
  cursor.style.width = cursor.style.height = `${width() * scale}px`;
  cursor.style.left = `${at.x * scale}px`;
  cursor.style.top = `${at.y * scale}px`;
}

function point(event) {
  const box = brush.getBoundingClientRect();
  const scale = brush.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

brush.addEventListener("pointerdown", (event) => {
  brush.setPointerCapture(event.pointerId);
  at = null;
  paint(...point(event));
  moveTo(...point(event));
});
brush.addEventListener("pointermove", (event) => {
  if (event.buttons) for (const each of event.getCoalescedEvents()) strokeTo(...point(each));
  moveTo(...point(event));
});

function strokeTo(x, y) {
  paint(x, y);
  moveTo(x, y);
}
brush.addEventListener("pointerleave", () => (cursor.hidden = true));
brush.addEventListener("blur", () => (cursor.hidden = true));
brush.addEventListener("focus", () => moveTo(...centre()));

const centre = () => (at ? [at.x, at.y] : [brush.width / 2, brush.height / 2]);

brush.addEventListener("keydown", (event) => {
  const step = (event.shiftKey ? 0.2 : 0.05) * Math.max(brush.width, brush.height);
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step],
    ArrowDown: [0, step] };
  const [x, y] = centre();
  if (event.key in moves) moveTo(x + moves[event.key][0], y + moves[event.key][1]);
  else if (event.key === " ") paint(x, y);
  else return;
  event.preventDefault();
  const [right, down] = [at.x / brush.width, at.y / brush.height].map((n) => Math.round(n * 100));
  say(`${event.key === " " ? "Painted at " : ""}${right} % from the left, ${down} % from the top`);
});

function clear() {
  context.clearRect(0, 0, brush.width, brush.height);
  painted = false;
}
$("paint-none").addEventListener("click", () => {
  clear();
  say("Nothing is painted.");
});
$("paint-all").addEventListener("click", () => {
  context.fillStyle = getComputedStyle(brush).color;
  context.fillRect(0, 0, brush.width, brush.height);
  painted = true;
  say("The whole picture is painted.");
});
$("brush-size").addEventListener("input", () => moveTo(...centre()));
$("edit-other").addEventListener("click", () => $("edit-file").click());

receives(panel, [$("edit-file")], async ([file]) => {
  try {
    const read = await readPicture(file);
    const image = $("edit-picture");
    image.src = read.uri;
    await image.decode().catch(() => {
      throw new Problem(`This browser cannot open ${file.name}. Save it as JPEG or PNG.`);
    });
    image.alt = read.name;
    [brush.width, brush.height] = [image.naturalWidth, image.naturalHeight];
    [picture, at, painted] = [read, null, false];
    $("edit-drop").hidden = true;
    $("easel").hidden = $("brushes").hidden = false;
    work.clear();
    brush.focus();
  } catch (error) {
    work.fail(error.message);
  }
});
