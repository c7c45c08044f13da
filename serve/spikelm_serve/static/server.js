// The way to the server: requests, its errors, and the events of a stream.

import { $ } from "./base.js";

class ServerError extends Error {
  constructor({ message, code, param } = {}) {
    super(message || "the server gave no reason");
    this.code = code;
    this.param = param;
  }

  // The state that was named is gone, or this model's template cannot go on from it.
  get isAboutState() {
    return this.code === "state_not_found" || this.param === "state.from";
  }

  // The stream that was named is gone, or its next events are.
  get isAboutStream() {
    return this.code === "stream_not_found" || this.code === "events_gone";
  }
}

// The way to the server failed, so that it is worth trying again.
export class ConnectionError extends ServerError {}

// From a proxy whose server cannot be reached, or a server that takes nothing just now.
const PASSING = [429, 502, 503, 504];

// Paths are relative: the page also works behind a proxy that puts it into a folder.
export async function call(path, { method, body, headers = {}, signal } = {}) {
  const key = $("key").value.trim();
  const options = { method: method ?? (body ? "POST" : "GET"), headers: { ...headers }, signal };
  if (key) options.headers.Authorization = `Bearer ${key}`;
  if (body) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionError({ message: `the server cannot be reached (${error.message})` });
  }
  if (response.ok) return response;
  // A proxy may answer with something other than the server's JSON.
  const given = await response.json().catch(() => null);
  const Kind = PASSING.includes(response.status) ? ConnectionError : ServerError;
  throw new Kind(given?.error ?? { message: `${response.status} ${response.statusText}` });
}

// Server-sent events until `[DONE]`: their numbers, if the stream can be resumed, and their data.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ConnectionError({ message: `the connection was lost (${error.message})` });
    });
    if (done) {
      throw new ConnectionError({ message: "the connection was cut before the answer ended" });
    }
    const blocks = (unread + value).split("\n\n");
    unread = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").map((line) => line.split(/: (.*)/s, 2));
      const { id = null, data } = Object.fromEntries(lines);
      // Anything else is a comment: ": ping".
      if (data === undefined) continue;
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error);
      yield { number: id, event };
    }
  }
}

// Raises: AbortError if `signal` ends it.
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}
