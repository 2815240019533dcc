// Talks to the server: requests, streams of events, and errors in words.

export const API = new URL("v1/", document.baseURI).href;

/** What a person is told. status: of the server's answer. */
export class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const WORDS = {
  401: "The server asks for an API key, or this key is wrong.",
  404: "The server does not have this.",
  413: "That is too large for this server.",
  429: "The server is busy.",
  503: "The server takes no requests now.",
};
const FAILED = "The server failed.";

/** The API key. It is kept until this tab of the browser is closed. */
export const key = {
  get value() {
    return sessionStorage.getItem("key") ?? "";
  },
  set value(text) {
    sessionStorage.setItem("key", text);
  },
};

/** Asks for a key when the server wants one: set by the page. */
export const wants = { key: () => {} };

/**
 * Sends a request.
 * request: {path, body} is JSON; {path, form, files} is a form, files: name -> Picture.
 * Raises Problem for anything but success.
 */
export async function send(request, signal) {
  const sent = key.value;
  const headers = sent ? { Authorization: `Bearer ${sent}` } : {};
  const how = { method: "POST", headers, signal };
  if (request.form) {
    how.body = new FormData();
    for (const [name, value] of Object.entries(request.form)) how.body.append(name, value);
    for (const [name, { blob, name: file }] of Object.entries(request.files))
      how.body.append(name, blob, file);
  } else if (request.body) {
    headers["Content-Type"] = "application/json";
    how.body = JSON.stringify(request.body);
  } else how.method = "GET";
  let response;
  try {
    response = await fetch(API + request.path, how);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem("The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw await problem(response, sent);
  return response;
}

async function problem(response, sent) {
  const { status } = response;
  const reason = await response.json().then((value) => value.error.message, () => "");
  if (status === 401 && sent === key.value) wants.key(); // not if another was given since
  const after = Number(response.headers.get("Retry-After"));
  const again = after ? ` Try again in ${after} seconds.` : "";
  const other = status < 500 ? "The server cannot do this." : FAILED;
  const first = WORDS[status] ?? other;
  return new Problem(`${first}${again}${reason ? ` It says: ${reason}` : ""}`, status);
}

/** The answer as JSON. Raises Problem. */
export async function ask(request, signal) {
  const response = await send(request, signal);
  try {
    return await response.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem("The connection ended before the answer was complete.");
  }
}

/** The server-sent events of an answer, as they arrive. Raises Problem for an event of an error. */
export async function* stream(request, signal) {
  const response = await send(request, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let complete = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (text + value).split("\n\n");
      text = events.pop();
      for (const event of events) {
        const data = event.slice(event.indexOf("data: ") + 6);
        if (data === "[DONE]") {
          complete = true;
          continue;
        }
        const message = JSON.parse(data);
        if (message.error) throw new Problem(`${FAILED} It says: ${message.error.message}`);
        complete ||= message.type?.endsWith(".completed") ?? false;
        yield message;
      }
    }
  } catch (error) {
    if (error instanceof Problem || signal?.aborted) throw error;
    complete = false;
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!complete) throw new Problem("The connection ended before the answer was complete.");
}
