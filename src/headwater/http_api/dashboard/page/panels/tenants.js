// Cached tokens by salt.

import { h, keepList, setText } from "../dom.js";
import { percent, short } from "../format.js";

const MOST = 12;

export function create(root) {
  const list = h("tbody");
  root.append(h("table", {}, h("thead", {}, h("tr", {}, ...["Salt", "Share", "Device", "Host"].map((text, index) =>
    h("th", { scope: "col", text, class: index ? "number" : "" })))), list));
  const more = h("p", { class: "soft" });
  root.append(more);
  return function update({ snapshot }) {
    const sums = new Map();
    for (const engine of Object.values(snapshot.engines)) {
      for (const space of Object.values(engine.map?.roots ?? {})) {
        const sum = sums.get(space.cache_salt) ?? { tokens: 0, device: 0, host: 0 };
        sum.tokens += space.num_tokens;
        sum.device += space.device;
        sum.host += space.host;
        sums.set(space.cache_salt, sum);
      }
    }
    const total = [...sums.values()].reduce((sum, { tokens }) => sum + tokens, 0);
    const found = [...sums].sort(([, a], [, b]) => b.tokens - a.tokens);
    keepList(list, found.slice(0, MOST), () => h("tr", {}, h("th", { scope: "row" }),
      h("td", { class: "number" }, h("span", { class: "meter" }, h("span")), h("span", { class: "value" })), h("td", { class: "number" }), h("td", { class: "number" })),
    (row, { tokens, device, host }, salt) => {
      const [name, share, onDevice, onHost] = row.children;
      setText(name, salt || "no salt");
      share.firstChild.firstChild.style.width = `${total ? (100 * tokens) / total : 0}%`;
      setText(share.lastChild, percent(total ? tokens / total : 0));
      setText(onDevice, short(device));
      setText(onHost, short(host));
    });
    setText(more, found.length > MOST ? `and ${found.length - MOST} more` : found.length ? "Cached tokens." : "Nothing is cached.");
  };
}
