// The selected node: its numbers, and what can be done with it.

import { h, setText, whileBusy } from "../dom.js";
import { count, namespace } from "../format.js";
import { call } from "../server.js";

const FACTS = [
  ["namespace", "Namespace"], ["tokens", "Tokens"], ["below", "Below it"], ["hits", "Hits"], ["device", "On device"], ["host", "On host"], ["pins", "Pins"],
];

/** Tokens and namespace of a node, as the routes take them. */
export async function pathOf(key) {
  const [rank, number] = key.split("/");
  return (await call("GET", `dashboard/node?dp_rank=${rank}&number=${number}`)).value;
}

export function createDetails(root, page) {
  const values = Object.fromEntries(FACTS.map(([id]) => [id, h("dd")]));
  const title = h("h3");
  const text = h("p", { class: "prefix-text" });
  const facts = h("dl", { class: "facts" }, ...FACTS.map(([id, words]) => h("div", {}, h("dt", { text: words }), values[id])));
  const seconds = h("input", { type: "number", min: "1", max: "2592000", value: "3600", id: "pin-seconds", "aria-label": "Seconds to pin" });
  const tier = h("select", { "aria-label": "Tiers to pin on" },
    ...[["device", "device"], ["host", "host"], ["device,host", "device and host"]].map(([value, words]) => h("option", { value, text: words })));
  const outcome = h("p", { class: "outcome", role: "status" });
  const pin = h("button", { type: "button", text: "Pin", onclick: () => whileBusy(pin, pinSelected) });
  const buttons = h("div", { class: "buttons" },
    h("button", { type: "button", id: "flush-selected", text: "Flush this prefix…", onclick: () => page.flushSelected?.() }),
    h("span", { class: "group" }, pin, " for ", seconds, " s on ", tier));
  const box = h("div", { class: "details", hidden: true }, title, text, facts, buttons, outcome);
  root.append(box);

  async function pinSelected() {
    try {
      const { cache_salt, extra_key, path_ids } = await pathOf(page.selected);
      const body = { input_ids: path_ids, cache_salt, extra_key, ttl_s: Number(seconds.value), tiers: tier.value.split(",") };
      const { value } = await call("POST", "cache/pin", { body });
      setText(outcome, `Pinned ${count(value.num_tokens)} tokens for ${seconds.value} s.`);
    } catch (error) {
      setText(outcome, error.message);
    }
  }

  let shownKey = null;
  return function update({ selected }, tree) {
    const entry = selected ? tree?.nodes.get(selected) : undefined;
    box.hidden = !entry;
    if (shownKey !== selected) setText(outcome, "");
    shownKey = selected;
    if (!entry) return;
    const { node, root: space } = entry;
    const at = node ? entry.namespace : space;
    setText(title, node ? `Node ${entry.number}` : "Namespace");
    setText(text, node?.text ?? "");
    setText(values.namespace, namespace(at.cache_salt, at.extra_key));
    setText(values.tokens, count(node ? node.tokens : space.num_tokens));
    setText(values.below, count(node ? node.below - node.tokens : space.num_tokens));
    setText(values.hits, node ? count(node.hits) : "–");
    setText(values.device, count((node ?? space).device));
    setText(values.host, count((node ?? space).host));
    setText(values.pins, node ? count(node.pins) : "–");
    buttons.hidden = !node;
  };
}
