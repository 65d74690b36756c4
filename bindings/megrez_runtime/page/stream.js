// The server's API, as this page uses it. Addresses are relative, so a path in front of all is fine.

const KEY = "megrez.key";

/** What went wrong: `kind` is a sentence of strings.js, `values` are its fields. */
export class ApiError extends Error {
  constructor(kind, values = {}) {
    super(kind);
    this.kind = kind;
    this.values = values;
  }
}

let key = "";
try {
  key = localStorage.getItem(KEY) ?? "";
} catch {
  // No storage: the key lasts as long as the page.
}

export function hasKey() {
  return key !== "";
}

/** Use `value` from now on, and keep it in the browser; "" forgets it. */
export function setKey(value) {
  key = value;
  try {
    if (key) localStorage.setItem(KEY, key);
    else localStorage.removeItem(KEY);
  } catch {
    // As above.
  }
}

/** The JSON at `path`. Throws ApiError. */
export async function get(path, signal) {
  const response = await request(path, { signal });
  return response.json();
}

/**
 * Ask for an answer; yield the stream's events as objects. Throws ApiError, and AbortError once
 * `signal` says stop: the connection is closed then, which ends the server's work.
 */
export async function* answer(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  for await (const data of serverSentEvents(response.body, signal)) {
    if (data === "[DONE]") return;
    const event = parse(data);
    if (event.error) throw new ApiError("failed", { detail: event.error.message });
    yield event;
  }
  throw new ApiError("broken");
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("broken");
  }
}

async function request(path, options) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("unreachable");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  if (status === 401) return new ApiError("keyNeeded");
  const text = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // A proxy in between speaks HTML.
  }
  if (status === 503) return new ApiError("loading");
  if (error.type === "exceed_context_size_error") {
    return new ApiError("overflow", { tokens: error.n_prompt_tokens, context: error.n_ctx });
  }
  return new ApiError("error", { status, detail: error.message ?? response.statusText });
}

/** The `data` of each server-sent event. Throws ApiError when the connection breaks. */
async function* serverSentEvents(body, signal) {
  // A pipe through TextDecoderStream would drop what it holds when the connection breaks.
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new ApiError("broken");
    }
    if (part.done) return;
    rest += decoder.decode(part.value, { stream: true });
    const lines = rest.split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      // The server writes an event's data on one line; other lines are comments and blanks.
      const found = /^data: ?(.*)$/.exec(line);
      if (found) yield found[1];
    }
  }
}
