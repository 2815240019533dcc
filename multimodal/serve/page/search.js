// The tab "Search": pictures of this computer, ranked by how well a text fits.
// The model sees each picture once; the ranking is done here.

import { code } from "./code.js";
import { $, count, make, say, works } from "./dom.js";
import { BadPicture, readPicture, receives } from "./pictures.js";
import { options } from "./settings.js";
import { Problem, ask } from "./server.js";

const SMALL = { bytes: 256 << 10, side: 512 }; // models see less
const AT_ONCE = 16; // pictures of a request
const SHOWN = 24;
const PICTURES = /\.(avif|bmp|gif|heic|heif|jpe?g|png|tiff?|webp)$/i;
const panel = $("search");
let items = []; // {file, address, row, bad}: address of its bytes, row: its embedding
let seenBy = ""; // the model that the rows are of

const work = works(panel, async (signal) => {
  if (!items.length) throw new Problem("Choose pictures first.");
  const { model } = options();
  if (model !== seenBy) for (const item of items) item.row = null;
  seenBy = model;
  await see(model, signal);
  const query = { path: "embeddings", body: { model, input: $("query").value.trim() } };
  const [row] = await embed(query, signal);
  await rank(row, query);
});

/** The rows of a request: unit vectors. */
async function embed(request, signal) {
  const { data } = await ask(request, signal);
  return data.map(({ embedding }) => embedding);
}

const about = (model, pictures) => ({
  path: "embeddings",
  body: {
    model,
    messages: pictures.map((picture) => ({
      role: "user",
      content: [{ type: "image_url", image_url: { url: picture } }],
    })),
  },
});

/** Embed the pictures that the model has not seen. Those that cannot be read are left out. */
async function see(model, signal) {
  const unseen = items.filter((item) => !item.row && !item.bad);
  const bar = $("progress");
  try {
    for (let start = 0; start < unseen.length; start += AT_ONCE) {
      Object.assign(bar, { hidden: false, max: unseen.length, value: start });
      tell(`The model has seen ${start} of ${unseen.length} pictures.`);
      await seeSome(model, unseen.slice(start, start + AT_ONCE), signal);
    }
  } finally {
    bar.hidden = true;
    const bad = items.filter((item) => item.bad);
    const names = bad.slice(0, 3).map(({ file }) => file.name).join(", ");
    const left = bad.length ? ` ${bad.length} cannot be read: ${names}.` : "";
    tell(`${count(items.length, "picture")}.${left}`);
  }
}

async function seeSome(model, some, signal) {
  try {
    const pictures = await Promise.all(some.map(({ file }) => readPicture(file, SMALL)));
    signal.throwIfAborted();
    const rows = await embed(about(model, pictures), signal);
    some.forEach((item, i) => (item.row = rows[i]));
  } catch (error) {
    const refused = error instanceof Problem && [400, 413].includes(error.status);
    if (!refused && !(error instanceof BadPicture)) throw error;
    if (some.length > 1) for (const item of some) await seeSome(model, [item], signal);
    else some[0].bad = true;
  }
}

/** Show the best pictures. Rows have unit norm, so their product is the cosine. */
async function rank(query, request) {
  const scored = items
    .filter((item) => item.row)
    .map((item) => ({ ...item, score: item.row.reduce((sum, x, i) => sum + x * query[i], 0) }))
    .sort((one, other) => other.score - one.score);
  if (!scored.length) throw new Problem("None of the pictures can be read.");
  const list = make("ol", { className: "pictures" });
  for (const { file, address, score } of scored.slice(0, SHOWN)) {
    const image = make("img", { src: address, alt: "", loading: "lazy" });
    const caption = make("figcaption", {}, make("b", {}, score.toFixed(2)), ` ${file.name}`);
    list.append(make("li", {}, make("figure", {}, image, caption)));
  }
  const best = await readPicture(scored[0].file, SMALL);
  const all = count(scored.length, "picture");
  const some = scored.length > SHOWN ? `${SHOWN} of ${all}` : all;
  const title = `${some} for “${request.body.input}”, the best first`;
  const codes = make("div", {}, code(request, "The text as code"),
    code(about(seenBy, [best]), "The best picture as code"));
  $("found").replaceChildren(make("h2", {}, title), list, codes);
  say(`${title}: ${scored.slice(0, 3).map(({ file }) => file.name).join(", ")}`);
}

const tell = (text) => ($("chosen").textContent = text);

receives(panel, [$("search-files"), $("search-folder")], (files) => {
  const pictures = files.filter((file) => PICTURES.test(file.name) || /^image/.test(file.type));
  for (const { address } of items) URL.revokeObjectURL(address);
  items = pictures.map((file) => ({ file, address: URL.createObjectURL(file), row: null }));
  $("found").replaceChildren();
  work.clear();
  tell(`${count(items.length, "picture")}.`);
  say(`${count(items.length, "picture")} chosen.`);
  if (!items.length) work.fail("There are no pictures among these files.");
  else $("query").focus();
});

if (!("webkitdirectory" in $("search-folder"))) $("folder").hidden = true;
