// Pause and continue, and the operations that wait for their moment.

import { h, keepList, setText, whileBusy } from "../dom.js";
import { blockers, plural, words } from "../format.js";
import { call } from "../server.js";

const MODES = [["in_place", "freeze requests"], ["retract", "queue them without KV"], ["abort", "end them"]];

export function create(root) {
  const mode = h("select", { id: "pause-mode", "aria-label": "What a pause does to running requests" },
    ...MODES.map(([value, text]) => h("option", { value, text })));
  const toggle = h("button", { type: "button", id: "pause" });
  const outcome = h("p", { class: "outcome", role: "status" });
  const list = h("ul", { class: "operations" });
  const none = h("p", { class: "soft", text: "No operation is pending." });
  root.append(h("div", { class: "buttons" }, toggle, mode), outcome, list, none);
  let paused = false;

  toggle.addEventListener("click", () => whileBusy(toggle, async () => {
    try {
      if (paused) {
        await call("POST", "continue_generation");
        setText(outcome, "Generation goes on.");
      } else {
        const { value } = await call("POST", "pause_generation", { body: { mode: mode.value } });
        setText(outcome, `Paused; ${plural(value.num_requests, "request")} ${value.num_requests === 1 ? "was" : "were"} running.`);
      }
    } catch (error) {
      setText(outcome, error.message);
    }
  }));

  async function cancel(id) {
    try {
      await call("DELETE", `control/operations/${encodeURIComponent(id)}`);
      setText(outcome, "Cancelled.");
    } catch (error) {
      setText(outcome, error.message);
    }
  }

  return function update({ snapshot }) {
    paused = Object.values(snapshot.engines).some((engine) => engine.paused);
    setText(toggle, paused ? "Continue" : "Pause");
    mode.hidden = paused;
    const found = Object.entries(snapshot.operations);
    none.hidden = found.length > 0;
    keepList(list, found, (_, id) => {
      const button = h("button", { type: "button", text: "Cancel", onclick: () => whileBusy(button, () => cancel(id)) });
      return h("li", {}, h("strong"), h("span", { class: "value" }), h("progress", { max: "1", "aria-label": "Time waited" }), h("span", { class: "soft" }), button);
    }, (item, operation) => {
      const [kind, left, bar, why] = item.children;
      const where = operation.ranks.length > 1 ? ` on ${operation.ranks.length} engines` : "";
      setText(kind, words(operation.kind));
      setText(left, operation.remaining_s >= 0 ? `${operation.remaining_s.toFixed(0)} s left` : "no deadline");
      bar.hidden = operation.remaining_s < 0;
      bar.value = operation.waited_s / Math.max(0.1, operation.waited_s + operation.remaining_s);
      setText(why, `${words(operation.phase)}${where}; in the way: ${blockers(operation.blockers)}`);
    });
  };
}
