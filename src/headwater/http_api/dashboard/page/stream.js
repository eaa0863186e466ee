// The server's events over fetch: EventSource sends no headers, and a key travels in one.

import { authorization } from "./server.js";

const RETRY_MS = [500, 1000, 2000, 5000];
const SILENT_MS = 25_000; // the server sends something every 10 s at least

/** `old` after a merge patch (RFC 7386). Unchanged parts stay the same objects. */
export function patched(old, patch) {
  const now = { ...old };
  for (const [name, value] of Object.entries(patch)) {
    if (value === null) delete now[name];
    else if (typeof value === "object" && !Array.isArray(value)) {
      const before = now[name];
      const isObject = before !== null && typeof before === "object" && !Array.isArray(before);
      now[name] = patched(isObject ? before : {}, value);
    } else now[name] = value;
  }
  return now;
}

/** Calls `on.whole(event)`, `on.patch(event)`, `on.lost(words)` and `on.refused(response)`; goes on for ever. */
export async function follow(on) {
  for (let failures = 0; ; failures += 1) {
    const stop = new AbortController();
    try {
      const response = await fetch("dashboard/events", { headers: authorization(), signal: stop.signal });
      if (response.status === 401 || response.status === 403) {
        await on.refused(response);
        failures = -1;
        continue;
      }
      if (!response.ok) throw new Error(await reason(response));
      await read(response.body.getReader(), on, stop, () => { failures = -1; });
      on.lost("The server has ended the stream.");
    } catch (error) {
      on.lost(error instanceof TypeError ? "The server cannot be reached." : error.message);
    }
    stop.abort();
    await new Promise((resolve) => { setTimeout(resolve, RETRY_MS[Math.min(Math.max(failures, 0), RETRY_MS.length - 1)]); });
  }
}

async function reason(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `The server answers ${response.status}.`;
}

async function read(reader, on, stop, heard) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const timer = setTimeout(() => stop.abort(new Error("The server is silent.")), SILENT_MS);
    const { done, value } = await reader.read().finally(() => clearTimeout(timer));
    if (done) return;
    heard();
    rest += decoder.decode(value, { stream: true });
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) take(event, on);
  }
}

function take(event, on) {
  const lines = event.split("\n");
  const name = lines.find((line) => line.startsWith("event: "))?.slice(7);
  const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
  if (name === "whole") on.whole(JSON.parse(data));
  else if (name === "patch") on.patch(JSON.parse(data));
}
