// Pictures from a person: chosen, dropped or pasted, and made smaller where they are large.

import { make } from "./dom.js";
import { Problem } from "./server.js";

const MOST = { bytes: 4 << 20, side: 2048 };

/** A file that cannot be read as a picture, whatever the server does. */
export class BadPicture extends Problem {}

/** A file of a picture. In a request it stands for its data URI. */
export class Picture {
  /** uri: data:image/...;base64,... */
  constructor(name, blob, uri) {
    Object.assign(this, { name, blob, uri });
  }

  toJSON() {
    return this.uri;
  }

  static async of(blob, name) {
    const reader = new FileReader();
    await new Promise((resolve, reject) => {
      reader.onload = resolve;
      reader.onerror = () => reject(new BadPicture(`${name} cannot be read.`));
      reader.readAsDataURL(blob);
    });
    return new Picture(name, blob, reader.result);
  }

  static async fromBase64(base64, name) {
    const uri = `data:image/png;base64,${base64}`;
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    return new Picture(name, new Blob([bytes], { type: "image/png" }), uri);
  }
}

/**
 * A file as a Picture. Over most.bytes it is drawn again, at most most.side pixels wide and high.
 * Raises BadPicture.
 */
export async function readPicture(file, most = MOST) {
  if (file.type && !file.type.startsWith("image/"))
    throw new BadPicture(`${file.name} is not a picture.`);
  if (file.size <= most.bytes) return Picture.of(file, file.name || "picture.png");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new BadPicture(`This browser cannot open ${file.name}. Save it as JPEG or PNG.`);
  }
  const scale = Math.min(1, most.side / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((n) => Math.max(1, n * scale));
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  return Picture.of(blob, file.name);
}

const receivers = new Map(); // panel -> what takes its files

/** take: gets the files that a person chooses in inputs, drops on the panel or pastes. */
export function receives(panel, inputs, take) {
  receivers.set(panel, take);
  for (const input of inputs)
    input.addEventListener("change", () => {
      const files = [...input.files];
      input.value = ""; // the same file may be chosen again
      if (files.length) take(files);
    });
}

/** Show another tab, and give it a Picture as if a person had chosen it. */
export function give(name, { blob, name: file }) {
  location.hash = name;
  receivers.get(document.getElementById(name))([new File([blob], file, { type: blob.type })]);
}

const shownPanel = () => [...receivers.keys()].find((panel) => !panel.hidden);

document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return; // a text, for a field
  event.preventDefault();
  receivers.get(shownPanel())?.(files);
});

document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault(); // else the browser leaves the page for the picture
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", async (event) => {
  document.body.classList.remove("dragging");
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.());
  const plain = [...event.dataTransfer.files];
  const files = entries.some((entry) => entry?.isDirectory)
    ? (await Promise.all(entries.map(filesUnder))).flat()
    : plain;
  if (files.length) receivers.get(shownPanel())?.(files);
});

/** The files of a dropped folder. */
async function filesUnder(entry) {
  if (!entry) return [];
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return found; // a reader gives at most 100 at a time
    found.push(...(await Promise.all(some.map(filesUnder))).flat());
  }
}
