// Each tier as a vessel with its owners, and their history.

import { createPlot } from "../charts/plot.js";
import { createReservoir } from "../charts/reservoir.js";
import { h, keepList, setText } from "../dom.js";
import { bytes, count } from "../format.js";

const OWNERS = [
  ["tree", "cached"], ["private", "private"], ["retired", "retired"], ["transfer", "arriving"], ["free", "free"],
];
const FILLED = ["tree", "private", "retired", "transfer"];
const WORDS = { device: "Device", host: "Host", storage: "Storage" };

export function create(root) {
  const tiers = h("div", { class: "tiers" });
  const storage = makeStore();
  const hint = h("p", { class: "soft hint", text: "Cached pages can be matched. Private pages belong to running requests, retired ones were flushed and are still held, arriving ones are filled by a copy." });
  root.append(tiers, hint);
  return function update(page) {
    const sums = sumTiers(page.snapshot.engines);
    keepList(tiers, Object.entries(sums), makeTier, (element, tier, name) => element.draw(tier, name, page));
    storage.show(tiers, page);
  };
}

function makeTier(_, name) {
  const vessel = h("div", { class: "vessel-box" });
  const rows = Object.fromEntries(OWNERS.map(([owner]) => [owner, { pages: h("td", { id: `${name}-${owner}` }), size: h("td") }]));
  const table = h("table", { class: "owners" },
    h("caption", { class: "away", text: `Pages on ${name} by owner` }),
    h("thead", { class: "away" }, h("tr", {}, ...["owner", "pages", "size"].map((text) => h("th", { scope: "col", text })))),
    h("tbody", {}, ...OWNERS.map(([owner, words]) => h("tr", {},
      h("th", { scope: "row" }, h("i", { class: `swatch c-${owner}` }), words), rows[owner].pages, rows[owner].size))));
  const title = h("h3");
  const chart = h("div", { class: "history" });
  const element = h("div", { class: "tier" }, title, h("div", { class: "level" }, vessel, table), chart);
  const drawVessel = createReservoir(vessel, FILLED);
  const drawPlot = createPlot(chart, {
    series: FILLED.map((key) => ({ key, words: key })), label: `History of the pages on ${name}`, areas: true, legend: false,
  });
  element.draw = (tier, tierName, { series, rangeS }) => {
    const size = tier.page_bytes;
    setText(title, `${WORDS[tierName] ?? tierName} · ${bytes(tier.capacity * size)}`);
    for (const [owner, { pages, size: sizeCell }] of Object.entries(rows)) {
      setText(pages, count(tier[owner]));
      setText(sizeCell, bytes(tier[owner] * size));
    }
    const top = Math.max(1, tier.capacity);
    const used = tier.capacity - tier.free;
    const label = `${tierName}: ${count(used)} of ${count(tier.capacity)} pages used`;
    drawVessel({ amounts: tier, capacity: tier.capacity, label });
    drawPlot({
      points: Object.fromEntries(FILLED.map((owner) => [owner, series.gauge(`${tierName}.${owner}`, rangeS)])),
      rangeS, now: series.last.t, format: (pages) => `${Math.round((100 * pages) / top)} %`, top, summary: label,
    });
  };
  return element;
}

/** The store as a vessel, if it has a limit. All engines share it, so the first one speaks for all. */
function makeStore() {
  const pages = h("td", { id: "storage-stored" });
  const [size, free] = [h("td"), h("td")];
  const vessel = h("div", { class: "vessel-box" });
  const table = h("table", { class: "owners" }, h("caption", { class: "away", text: "Pages in the store" }), h("tbody", {},
    h("tr", {}, h("th", { scope: "row" }, h("i", { class: "swatch c-storage" }), "stored"), pages, size),
    h("tr", {}, h("th", { scope: "row" }, h("i", { class: "swatch c-free" }), "free"), h("td"), free)));
  const title = h("h3");
  const chart = h("div", { class: "history" });
  const element = h("div", { class: "tier" }, title, h("div", { class: "level" }, vessel, table), chart);
  const drawVessel = createReservoir(vessel, ["storage"]);
  const drawPlot = createPlot(chart, { series: [{ key: "storage", words: "stored" }], label: "History of the store", areas: true, legend: false });
  const show = (tiers, { snapshot, series, rangeS }) => {
    const store = Object.values(snapshot.engines).find((engine) => engine.up && engine.storage.capacity_bytes)?.storage;
    if (!store) {
      element.remove();
      return;
    }
    if (tiers.lastElementChild !== element) tiers.append(element);
    const capacity = Math.max(1, store.capacity_bytes);
    setText(title, `Storage (${store.kind}) · ${bytes(capacity)}`);
    setText(pages, count(store.num_pages));
    setText(size, bytes(store.num_bytes));
    setText(free, bytes(Math.max(0, capacity - store.num_bytes)));
    const label = `storage: ${bytes(store.num_bytes)} of ${bytes(capacity)} used`;
    drawVessel({ amounts: { storage: Math.min(capacity, store.num_bytes) }, capacity, label });
    drawPlot({
      points: { storage: series.gauge("storage.stored", rangeS) },
      rangeS, now: series.last.t, format: (value) => `${Math.round((100 * value) / capacity)} %`, top: capacity, summary: label,
    });
  };
  return { show };
}

export function sumTiers(engines) {
  const sums = {};
  for (const engine of Object.values(engines)) {
    for (const [name, tier] of Object.entries(engine.tiers ?? {})) {
      const sum = sums[name] ?? (sums[name] = { page_bytes: tier.page_bytes, capacity: 0 });
      for (const [owner] of OWNERS) sum[owner] = (sum[owner] ?? 0) + tier[owner];
      sum.capacity += tier.capacity;
    }
  }
  return sums;
}
