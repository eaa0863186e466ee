// Calls of the server's own routes. A key that is asked for stays in this tab.

const KEY = "headwater-key";
let askForKey = async () => {};

export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

/** Headers of every call: the key, and of several models in a fleet the one that the page's address names. */
export function authorization() {
  const key = sessionStorage.getItem(KEY);
  const model = new URLSearchParams(location.search).get("model");
  const named = model ? { serve_multiplexed_model_id: model } : {};
  return key ? { Authorization: `Bearer ${key}`, ...named } : named;
}

/** The server refused; `status` and its own words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** JSON or text of an answer with 2xx; Refused otherwise. A missing key is asked for, and the call made again. */
export async function call(method, path, { body, accept = "application/json", signal } = {}) {
  for (;;) {
    const headers = { Accept: accept, ...authorization(), ...(body === undefined ? {} : { "Content-Type": "application/json" }) };
    const response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
    if (response.status === 401 || response.status === 403) {
      const text = await response.clone().text();
      if (!text.includes("cross_site")) {
        await askForKey(messageOf(text));
        continue;
      }
    }
    const text = await response.text();
    if (!response.ok) throw new Refused(response.status, messageOf(text));
    const isJson = response.headers.get("content-type")?.includes("json");
    return { status: response.status, value: isJson && text ? JSON.parse(text) : text };
  }
}

function messageOf(text) {
  try {
    const found = JSON.parse(text);
    return found.error?.message ?? found.message ?? text;
  } catch {
    return text.trim();
  }
}
