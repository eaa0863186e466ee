// A flush in three steps: choose, see what it would cut, confirm. Nothing is flushed that was not previewed.

import { h, keepList, setText } from "../dom.js";
import { blockers, bytes, duration, plural } from "../format.js";
import { call, Refused } from "../server.js";
import { pathOf } from "./node_details.js";
import { treeOf } from "../charts/tree_map.js";

const MODES = [
  ["idle", "At the first idle moment", "waits up to the timeout for a moment without work"],
  ["now", "Now, under load", "running requests keep their pages until they end"],
  ["drain", "Now, and wait for the last page", "as now; answers when the old pages are free"],
];

export function create(root, page) {
  const form = makeForm(root);
  const result = h("div", { class: "result", role: "status" });
  const progress = h("div", { class: "progress", hidden: true }, h("progress", { max: "1", value: "0", "aria-label": "Time waited of the timeout" }),
    h("p"), h("button", { type: "button", id: "flush-cancel", text: "Cancel the flush" }));
  const confirm = h("div", { class: "buttons", hidden: true },
    h("button", { type: "button", class: "danger", id: "flush-confirm", text: "Flush now" }),
    h("button", { type: "button", id: "flush-back", text: "Back" }));
  root.append(form.element, result, confirm, progress);
  let preview = null; // what was shown: the body of the call that may follow
  let running = null; // { since, timeout, stop }

  function reset() {
    preview = null;
    confirm.hidden = true;
    page.cut = null;
  }

  async function bodyOfForm() {
    const body = { mode: form.mode(), tiers: form.tiers(), timeout: form.timeout() };
    if (form.holds()) body.hold = true;
    const [kind, name] = form.scope();
    if (kind === "salt") body.cache_salt = name;
    if (kind === "key") body.extra_key = name;
    if (kind === "prefix") {
      const path = await pathOf(page.selected);
      Object.assign(body, { prefix_ids: path.flush_ids, cache_salt: path.cache_salt, extra_key: path.extra_key });
    }
    return body;
  }

  async function dryRun() {
    reset();
    form.busy(true);
    try {
      const body = await bodyOfForm();
      const { value } = await call("POST", "flush_cache", { body: { ...body, timeout: 0, hold: false, dry_run: true } });
      preview = body;
      page.cut = cutOf(form.scope(), page);
      result.replaceChildren(...describePreview(value, body));
      confirm.hidden = false;
      confirm.firstChild.focus();
    } catch (error) {
      result.replaceChildren(h("p", { class: "bad", text: error.message }));
    } finally {
      form.busy(false);
      page.show();
    }
  }

  async function flush() {
    const body = preview;
    const stop = new AbortController();
    running = { since: performance.now(), timeout: body.timeout, stop };
    confirm.hidden = true;
    form.busy(true);
    result.replaceChildren(h("p", { text: "Flushing …" }));
    try {
      const { status, value } = await call("POST", "flush_cache", { body, accept: "text/plain", signal: stop.signal });
      result.replaceChildren(h("p", { class: status === 200 ? "good" : "held", text: value.trim() }));
    } catch (error) {
      const words = error.name === "AbortError" ? "Cancelled. A flush that still waited has changed nothing." : error.message;
      result.replaceChildren(h("p", { class: error instanceof Refused ? "bad" : "held", text: words }));
    } finally {
      running = null;
      progress.hidden = true;
      form.busy(false);
      reset();
      page.show();
      form.focus();
    }
  }

  form.element.addEventListener("submit", (event) => { event.preventDefault(); if (!form.isBusy()) dryRun(); });
  form.element.addEventListener("input", () => { if (preview) { reset(); result.replaceChildren(); page.show(); } });
  confirm.firstChild.addEventListener("click", flush);
  confirm.lastChild.addEventListener("click", () => { reset(); result.replaceChildren(); page.show(); form.focus(); });
  progress.lastChild.addEventListener("click", () => running?.stop.abort());
  page.flushSelected = () => { form.choosePrefix(); reset(); result.replaceChildren(); page.show(); form.focus(); };

  return function update({ snapshot, selected }) {
    form.update(snapshot, selected?.includes("/r") ? null : selected);
    if (!running) return;
    const waited = (performance.now() - running.since) / 1000;
    progress.hidden = false;
    progress.firstChild.value = running.timeout ? Math.min(1, waited / running.timeout) : 0;
    const found = {};
    for (const engine of Object.values(snapshot.engines)) {
      for (const [name, number] of Object.entries(engine.blockers ?? {})) found[name] = (found[name] ?? 0) + number;
    }
    setText(progress.children[1], `${duration(waited)} of ${duration(running.timeout)}. In the way: ${blockers(found)}.`);
  };
}

function describePreview(answer, body) {
  const rows = Object.entries(answer.freed).map(([tier, { pages, bytes: size }]) => {
    const held = answer.retired[tier]?.pages ?? 0;
    return h("li", { text: `${tier}: ${plural(pages, "page")} freed, ${bytes(size)}${held ? `; ${plural(held, "page")} held by requests until they end` : ""}` });
  });
  const waits = Object.keys(answer.blockers).length > 0 && body.mode === "idle";
  const notes = [
    answer.still_warm.length ? `Still warm afterwards: ${answer.still_warm.join(", ")}.` : "",
    waits ? `It would wait for: ${blockers(answer.blockers)}.` : "",
  ].filter(Boolean);
  return [h("p", { text: "Dry run, nothing was changed. The flush would cut:" }), h("ul", {}, ...rows),
    ...notes.map((text) => h("p", { class: "soft", text }))];
}

/** Whether a node of the map lies in the scope. */
function cutOf([kind, name], { snapshot, selected }) {
  if (kind === "salt") return (entry) => (entry.namespace ?? entry.root).cache_salt === name;
  if (kind === "key") return (entry) => (entry.namespace ?? entry.root).extra_key === name;
  if (kind === "all") return () => true;
  const below = new Set();
  const add = (entry) => { below.add(entry.key); entry.children.forEach(add); };
  const top = treeOf(snapshot.engines).nodes.get(selected);
  if (top) add(top);
  return (entry) => below.has(entry.key);
}

function makeForm() {
  const modes = h("fieldset", {}, h("legend", { text: "When" }), ...MODES.map(([value, words, more], index) =>
    h("label", { class: "choice", title: more }, h("input", { type: "radio", name: "mode", value, checked: index === 0 }), words)));
  const scope = h("select", { id: "flush-scope" });
  const tierBox = h("div", { class: "choices" });
  const timeout = h("input", { type: "number", id: "flush-timeout", min: "0", value: "10", step: "any", required: true });
  const hold = h("input", { type: "checkbox", id: "flush-hold" });
  const preview = h("button", { type: "submit", class: "primary", id: "flush-preview", text: "Dry run" });
  const element = h("form", {},
    modes,
    h("label", { class: "field" }, "What", scope),
    h("fieldset", {}, h("legend", { text: "Tiers" }), tierBox),
    h("label", { class: "field" }, "Timeout in seconds", timeout),
    h("label", { class: "choice" }, hold, "Start no new requests meanwhile"),
    h("div", { class: "buttons" }, preview));
  const mode = () => new FormData(element).get("mode");
  element.addEventListener("input", () => { hold.disabled = mode() !== "idle"; timeout.disabled = mode() === "now"; });
  return {
    element,
    mode,
    scope: () => JSON.parse(scope.value),
    tiers: () => [...tierBox.querySelectorAll("input:checked:not(:disabled)")].map(({ value }) => value),
    timeout: () => (timeout.disabled ? 0 : Number(timeout.value)),
    holds: () => hold.checked && !hold.disabled,
    busy: (is) => { preview.ariaDisabled = is ? "true" : null; },
    isBusy: () => preview.ariaDisabled === "true",
    focus: () => preview.focus(),
    choosePrefix: () => { scope.value = JSON.stringify(["prefix"]); },
    update(snapshot, selected) {
      timeout.max = snapshot.server.max_timeout_s;
      keepList(scope, scopes(snapshot, selected), ([, value]) => h("option", { value }), (option, [words]) => setText(option, words));
      const tiers = new Set(Object.values(snapshot.engines).flatMap((engine) => Object.keys(engine.tiers ?? {})));
      if (Object.values(snapshot.engines).some((engine) => engine.storage?.kind)) tiers.add("storage");
      keepList(tierBox, [...tiers].map((tier) => [tier, tier]), makeTierChoice, (label) => {
        const box = label.firstChild;
        box.disabled = box.value === "storage" && scope.value === JSON.stringify(["prefix"]);
      });
    },
  };
}

const makeTierChoice = (tier) => h("label", { class: "choice" },
  h("input", { type: "checkbox", value: tier, checked: tier !== "storage" }), tier);

function scopes(snapshot, selected) {
  const roots = Object.values(snapshot.engines).flatMap((engine) => Object.values(engine.map?.roots ?? {}));
  const salts = new Set(roots.map((root) => root.cache_salt));
  const keys = new Set(roots.map((root) => root.extra_key).filter(Boolean));
  const found = [["Everything", ["all"]]];
  if (selected) found.push([`Node ${selected.split("/")[1]} and all below it`, ["prefix"]]);
  for (const salt of salts) found.push([salt ? `Salt ${salt}` : "Requests without salt", ["salt", salt]]);
  for (const key of keys) found.push([`Key ${key}`, ["key", key]]);
  return found.map(([words, value]) => [JSON.stringify(value), [words, JSON.stringify(value)]]);
}
