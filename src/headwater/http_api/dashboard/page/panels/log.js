// What happened while pages were open, the newest first.

import { h, keepList, setText } from "../dom.js";
import { clock } from "../format.js";

export function create(root) {
  const list = h("ol", { class: "log" });
  const none = h("p", { class: "soft", text: "Nothing has happened since the page was opened." });
  root.append(h("div", { class: "scroll tall", tabindex: "0", role: "group", "aria-label": "Events, the newest first" }, list), none);
  return function update({ snapshot }) {
    const several = Object.keys(snapshot.engines).length > 1;
    const found = Object.entries(snapshot.log).sort(([a], [b]) => b - a);
    none.hidden = found.length > 0;
    keepList(list, found, ({ level }) => h("li", { "data-level": level }, h("time"), h("span")), (item, entry) => {
      setText(item.firstChild, clock(entry.t));
      const who = several ? `engine ${entry.rank} ` : "";
      const text = `${who}${entry.text}`;
      setText(item.lastChild, text[0].toUpperCase() + text.slice(1));
    });
  };
}
