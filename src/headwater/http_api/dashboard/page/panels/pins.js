// Pins, and their end.

import { h, keepList, setText, whileBusy } from "../dom.js";
import { count, duration, namespace } from "../format.js";
import { call } from "../server.js";

export function create(root) {
  const list = h("ul", { class: "pins" });
  const none = h("p", { class: "soft", text: "Nothing is pinned. Select a prefix on the map to pin it." });
  const outcome = h("p", { class: "outcome", role: "status" });
  root.append(list, none, outcome);

  async function end(id) {
    try {
      await call("DELETE", `cache/pin/${encodeURIComponent(id)}`);
      setText(outcome, "The pin has ended.");
    } catch (error) {
      setText(outcome, error.message);
    }
  }

  return function update({ snapshot }) {
    const found = Object.entries(snapshot.engines).flatMap(([rank, engine]) =>
      Object.entries(engine.pins ?? {}).map(([id, pin]) => [`${rank}.${id}`, pin]));
    none.hidden = found.length > 0;
    keepList(list, found, (_, id) => {
      const button = h("button", { type: "button", text: "End", "aria-label": `End ${id}`, onclick: () => whileBusy(button, () => end(id)) });
      return h("li", {}, h("strong"), h("span", { class: "value" }), h("span", { class: "soft" }), button);
    }, (item, pin, id) => {
      const [name, tokens, more] = item.children;
      setText(name, id);
      setText(tokens, `${count(pin.num_tokens)} tokens`);
      const where = pin.gave_way || (pin.tiers.length ? `on ${pin.tiers.join(" and ")}` : "nowhere");
      setText(more, `${namespace(pin.cache_salt, pin.extra_key)}; ${where}; ${duration(pin.ends_in_s)} left`);
    });
  };
}
