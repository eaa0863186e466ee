// Engines, or the replicas of a fleet, side by side.

import { h, keepList, setText } from "../dom.js";
import { count, duration, percent, rate } from "../format.js";
import { storeTrouble } from "./notices.js";

const COLUMNS = ["Engine", "State", "Running", "Queued", "Tokens/s", "Hit rate", "Device", "Host", "Generation", "Weights", "Up for"];
const TIERS = ["cached_tokens_device", "cached_tokens_host", "cached_tokens_storage"];

export function create(root) {
  const rows = h("tbody");
  root.append(h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Engines side by side" },
    h("table", {}, h("thead", {}, h("tr", {}, ...COLUMNS.map((text, index) => h("th", { scope: "col", text, class: index > 1 ? "number" : "" })))), rows)));
  const before = new Map(); // by rank: time and tokens of an earlier snapshot, a few seconds ago

  return function update({ snapshot }) {
    keepList(rows, Object.entries(snapshot.engines), makeRow, (row, engine, rank) => {
      const cells = row.children;
      setText(cells[0], rank);
      const state = !engine.up || engine.message ? "bad" : engine.paused || engine.held_by.length || storeTrouble(engine) ? "held" : "good";
      cells[1].firstChild.dataset.kind = state;
      setText(cells[1].lastChild, engine.message || (engine.held_by.length ? engine.held_by.join(", ") : engine.paused ? "paused" : storeTrouble(engine) ? "serving, store fails" : "serving"));
      if (!engine.up) {
        for (const cell of [...cells].slice(2)) setText(cell, "–");
        return;
      }
      const { counters, requests } = engine;
      const cached = TIERS.reduce((sum, name) => sum + counters[name], 0);
      const texts = [
        String(requests.running), String(requests.queued), rate(speed(before, rank, snapshot.sample.t, counters.generated_tokens)),
        percent(counters.prompt_tokens ? cached / counters.prompt_tokens : NaN), used(engine.tiers.device), used(engine.tiers.host),
        count(engine.generation), engine.weight_version, duration(engine.uptime_s),
      ];
      texts.forEach((text, index) => setText(cells[index + 2], text));
    });
  };
}

const makeRow = () => h("tr", {}, h("th", { scope: "row" }), h("td", {}, h("i", { class: "dot" }), h("span")),
  ...COLUMNS.slice(2).map(() => h("td", { class: "number" })));

const used = (tier) => (tier ? `${percent((tier.capacity - tier.free) / tier.capacity)}` : "–");

function speed(before, rank, t, tokens) {
  const known = (before.get(rank) ?? []).filter((each) => t - each.t <= 6000 && each.tokens <= tokens);
  known.push({ t, tokens });
  before.set(rank, known);
  const [oldest] = known;
  return t > oldest.t ? (1000 * (tokens - oldest.tokens)) / (t - oldest.t) : 0;
}
