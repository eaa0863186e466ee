// Copies between the tiers, and the store: its state, attaching and detaching.

import { h, keepList, setText, whileBusy } from "../dom.js";
import { bytes, count, duration, words } from "../format.js";
import { call } from "../server.js";
import { storeTrouble } from "./notices.js";

const KINDS = [["offload", "device → host"], ["restore", "host → device"], ["persist", "host → storage"], ["prefetch", "storage → host"]];

const WORKS = "works";

export function create(root) {
  const rows = h("tbody");
  const table = h("table", {}, h("thead", {}, h("tr", {}, ...["Copies", "Now", "In range", "Speed"].map((text, index) =>
    h("th", { scope: "col", text, class: index ? "number" : "" })))), rows);
  const noTiers = h("p", { class: "soft", text: "This server has no host tier (--enable-hierarchical-cache)." });
  const title = h("h3", { text: "Store" });
  const facts = h("dl", { class: "facts" });
  const outcome = h("p", { class: "outcome", role: "status" });
  const attach = makeAttachForm(outcome);
  const detach = h("button", { type: "button", id: "store-detach", text: "Detach the store" });
  const buttons = h("div", { class: "buttons" }, detach);
  root.append(table, noTiers, title, facts, attach, buttons, outcome);

  detach.addEventListener("click", () => whileBusy(detach, async () => {
    try {
      const { value } = await call("DELETE", "hicache/storage-backend", { accept: "text/plain" });
      setText(outcome, value.trim());
    } catch (error) {
      setText(outcome, error.message);
    }
  }));

  return function update({ snapshot, series, rangeS }) {
    const engines = Object.values(snapshot.engines).filter((engine) => engine.up);
    const hasHost = engines.some((engine) => "host" in engine.tiers);
    const store = (engines.find(storeTrouble) ?? engines.find((engine) => engine.storage.kind))?.storage;
    table.hidden = title.hidden = !hasHost;
    noTiers.hidden = hasHost;
    attach.hidden = !hasHost || Boolean(store);
    buttons.hidden = facts.hidden = !store;
    keepList(rows, hasHost ? KINDS : [], () => h("tr", {}, h("th", { scope: "row" }, h("span"), h("small", { class: "soft" })), ...[1, 2, 3].map(() => h("td", { class: "number" }))),
      (row, way, kind) => {
        const inFlight = engines.reduce((sum, engine) => sum + (engine.copies[kind]?.in_flight ?? 0), 0);
        const [size, ms] = [series.growth(`${kind}.bytes`, rangeS), series.growth(`${kind}.ms`, rangeS)];
        setText(row.firstChild.firstChild, kind);
        setText(row.firstChild.lastChild, way);
        const texts = [String(inFlight), bytes(size), ms > 0 ? `${bytes((1000 * size) / ms)}/s` : "–"];
        texts.forEach((text, index) => setText(row.children[index + 1], text));
      });
    keepList(facts, store ? storeFacts(store) : [], (_, name) => h("div", {}, h("dt", { text: name }), h("dd")),
      (element, text, name) => {
        setText(element.lastChild, text);
        element.lastChild.dataset.kind = name === "State" && text !== WORKS ? "held" : "";
      });
  };
}

function storeFacts(store) {
  const { trouble } = store;
  const state = trouble?.happened ? `⚠\uFE0E fails for ${duration(trouble.failing_s)}` : WORKS;
  const capacity = store.capacity_bytes === undefined ? "" : ` of ${bytes(store.capacity_bytes)}`;
  const found = [
    ["State", state], ["Kind", store.kind], ["Circuit breaker", words(store.breaker)], ["Holds", `${count(store.num_pages)} pages, ${bytes(store.num_bytes)}${capacity}`],
    ["Prefetch", words(store.prefetch_policy)], ["Write", words(store.write_policy)],
  ];
  if (store.message) found.push(["Note", store.message]);
  return found;
}

function makeAttachForm(outcome) {
  const kind = h("select", { id: "store-kind" }, ...["file", "redis", "memory"].map((value) => h("option", { value, text: value })));
  const place = h("input", { id: "store-place", autocomplete: "off", spellcheck: "false" });
  const placeLabel = h("span", { text: "Directory on the server" });
  const placeField = h("label", { class: "field" }, placeLabel, place);
  const size = h("input", { id: "store-size", placeholder: "16GiB", autocomplete: "off" });
  const submit = h("button", { type: "submit", text: "Attach a store" });
  kind.addEventListener("change", () => {
    placeField.hidden = kind.value === "memory";
    setText(placeLabel, kind.value === "redis" ? "URL" : "Directory on the server");
  });
  const form = h("form", {}, h("label", { class: "field" }, "Kind", kind), placeField, h("label", { class: "field" }, "Size", size),
    h("div", { class: "buttons" }, submit));
  const send = async () => {
    const body = { hicache_storage_backend: kind.value };
    if (place.value && kind.value !== "memory") body[kind.value === "redis" ? "url" : "directory"] = place.value;
    if (size.value) body.size = size.value;
    try {
      const { value } = await call("PUT", "hicache/storage-backend", { body, accept: "text/plain" });
      setText(outcome, value.trim());
    } catch (error) {
      setText(outcome, error.message);
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    whileBusy(submit, send);
  });
  return form;
}
