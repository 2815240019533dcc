// A request as commands to copy: curl, and Python with the openai package.

import { copyable, make } from "./dom.js";
import { Picture } from "./pictures.js";
import { API, key } from "./server.js";

const NOT_OF_OPENAI = ["seed", "temperature", "guidance_scale", "steps", "negative_prompt"];
const VARIABLE = "MULTIMODAL_API_KEY";
const SAVE = " | jq -r '.data[0].b64_json' | base64 --decode > drawing.png";

/** A folded part of the page with both. request: see server.js. */
export function code(request, title = "As code") {
  const part = make("details", { className: "codes" }, make("summary", {}, title));
  part.addEventListener("toggle", () => {
    if (part.childElementCount === 1)
      part.append(copyable("as curl", asCurl(request)), copyable("as Python", asPython(request)));
  });
  return part;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const draws = (path) => path.startsWith("images/");

/** A drawing is the same without a stream, and easier to save. */
function plain({ path, body, form }) {
  const { stream, partial_images, stream_options, ...rest } = body ?? form;
  return draws(path) || !stream ? rest : { ...rest, stream };
}

/** A command of a shell. Pictures are read from the files of their names. */
export function asCurl(request) {
  const lines = [`curl ${quoted(API + request.path)}`];
  if (key.value) lines.push(`-H "Authorization: Bearer $${VARIABLE}"`);
  const values = plain(request);
  if (request.form) {
    for (const [name, file] of Object.entries(request.files))
      lines.push(`-F ${quoted(`${name}=@"${file.name.replace(/(["\\])/g, "\\$1")}"`)}`);
    for (const [name, value] of Object.entries(values))
      lines.push(`--form-string ${quoted(`${name}=${value}`)}`);
    return lines.join(" \\\n  ") + SAVE;
  }
  // A here-document reads backslashes, $ and `.
  let text = JSON.stringify(values, null, 1).replace(/[\\$`]/g, "\\$&");
  for (const picture of picturesIn(values)) {
    const read = `$(base64 < ${quoted(picture.name)} | tr -d '\\n')`;
    text = text.replace(picture.uri, () => `data:image/${kind(picture)};base64,${read}`);
  }
  if (values.stream) lines[0] = lines[0].replace("curl", "curl -N");
  lines.push("-H 'Content-Type: application/json'", "-d @- <<JSON");
  return `${lines.join(" \\\n  ")}${draws(request.path) ? SAVE : ""}\n${text}\nJSON`;
}

const kind = (picture) => /^data:image\/([\w.+-]+)/.exec(picture.uri)?.[1] ?? "png";

function picturesIn(value) {
  if (value instanceof Picture) return [value];
  return value && typeof value === "object" ? Object.values(value).flatMap(picturesIn) : [];
}

/** A program. */
export function asPython(request) {
  const values = plain(request);
  const pictures = picturesIn(values);
  const lines = [];
  if (pictures.length || draws(request.path)) lines.push("import base64");
  if (key.value) lines.push("import os");
  lines.push("", "from openai import OpenAI", "");
  const secret = key.value ? `os.environ["${VARIABLE}"]` : '"none"';
  lines.push(`client = OpenAI(base_url=${literal(API)}, api_key=${secret})`);
  const names = new Map(pictures.map((picture, i) => [picture, i ? `image_${i + 1}` : "image"]));
  for (const [picture, name] of names) {
    lines.push(`with open(${literal(picture.name)}, "rb") as file:`);
    lines.push(`    ${name} = "data:image/${kind(picture)};base64," + \\`);
    lines.push("        base64.b64encode(file.read()).decode()");
  }
  lines.push(...calls(request, values, names));
  return lines.join("\n").trim();
}

/** The lines that call the client and show what it answers. */
function calls({ path, files }, values, names) {
  const argument = (value) => indented(literal(value, names));
  if (path === "embeddings" && values.messages)
    return [
      `answer = client.post("/embeddings", body=${literal(values, names)}, cast_to=object)`,
      'print(answer["data"][0]["embedding"])',
    ];
  const method = {
    "chat/completions": "chat.completions.create",
    "images/generations": "images.generate",
    "images/edits": "images.edit",
    embeddings: "embeddings.create",
  }[path];
  const own = Object.entries(values);
  const extra = own.filter(([name]) => draws(path) && NOT_OF_OPENAI.includes(name));
  const standard = own.filter((pair) => !extra.includes(pair));
  const lines = [`answer = client.${method}(`];
  for (const [name, file] of Object.entries(files ?? {}))
    lines.push(`    ${name}=open(${literal(file.name)}, "rb"),`);
  for (const [name, value] of standard) lines.push(`    ${name}=${argument(value)},`);
  if (extra.length) lines.push(`    extra_body=${argument(Object.fromEntries(extra))},`);
  lines.push(")");
  if (values.stream)
    lines.push(
      "for chunk in answer:",
      "    for choice in chunk.choices:",
      '        print(choice.delta.content or "", end="", flush=True)',
    );
  else if (draws(path))
    lines.push(
      'with open("drawing.png", "wb") as file:',
      "    file.write(base64.b64decode(answer.data[0].b64_json))",
    );
  else lines.push("print(answer.data[0].embedding)");
  return lines;
}

const indented = (text) => text.replaceAll("\n", "\n    ");

/** A value as Python writes it. names: Picture -> the name of a variable. */
function literal(value, names = new Map()) {
  if (names.has(value)) return names.get(value);
  if (Array.isArray(value)) return `[${value.map((item) => literal(item, names)).join(", ")}]`;
  if (value && typeof value === "object") {
    const items = Object.entries(value).map(([k, v]) => `${literal(k)}: ${literal(v, names)}`);
    return `{${items.join(", ")}}`;
  }
  if (typeof value === "boolean") return value ? "True" : "False";
  return value === null ? "None" : JSON.stringify(value);
}
