// What an operator should know before all else: a store in trouble, what happened to it and what to do.

import { h, keepList, setText, svg } from "../dom.js";
import { duration } from "../format.js";

export function create(root) {
  return function update({ snapshot }) {
    keepList(root, troubles(snapshot.engines), makeNotice, (notice, { trouble, ranks }) => {
      const [happened, todo, times] = notice.querySelectorAll("p");
      setText(happened, trouble.happened);
      setText(todo, `What to do: ${trouble.todo}`);
      const where = Object.keys(snapshot.engines).length > 1 ? `Engine ${ranks.join(", ")}. ` : "";
      const next = trouble.retry_in_s > 0 ? ` Next try in ${duration(trouble.retry_in_s)}.` : "";
      setText(times, `${where}For ${duration(trouble.failing_s)}.${next}`);
    });
  };
}

/** The trouble of the engines' stores, in the order of ranks, as [words, {trouble, ranks}]: the same words once. */
function troubles(engines) {
  const found = new Map();
  for (const [rank, engine] of Object.entries(engines)) {
    const trouble = storeTrouble(engine);
    if (!trouble) continue;
    if (found.has(trouble.happened)) found.get(trouble.happened).ranks.push(rank);
    else found.set(trouble.happened, { trouble, ranks: [rank] });
  }
  return [...found];
}

export const storeTrouble = (engine) => (engine.up && engine.storage.trouble?.happened ? engine.storage.trouble : null);

// The seconds change all the time: a screen reader says the sentences once, and no second.
const makeNotice = () => h("article", { class: "notice" }, warningSign(), h("div", {}, h("h2", { text: "Warning: the store fails" }),
  h("p"), h("p"), h("p", { class: "soft times", "aria-live": "off" }), h("a", { href: "#copies", text: "Show the store" })));

const warningSign = () => svg("svg", { viewBox: "0 0 24 24", class: "sign", "aria-hidden": "true" },
  svg("path", { d: "M12 2 23 21H1Z" }), svg("path", { class: "mark", d: "M12 9v6m0 2.6v1.2" }));
