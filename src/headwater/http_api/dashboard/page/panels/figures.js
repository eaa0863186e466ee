// The numbers that are looked at first.

import { h, setText } from "../dom.js";
import { percent, rate, seconds } from "../format.js";

const TIERS = ["cached_tokens_device", "cached_tokens_host", "cached_tokens_storage"];
const FIGURES = [
  ["hit-rate", "Hit rate", "of prompt tokens, in the range"],
  ["tokens", "Generated", "tokens a second, in the range"],
  ["ttft", "First token", "median, p99"],
  ["itl", "Next token", "median, p99"],
  ["running", "Running", "requests"],
  ["queued", "Queued", "requests"],
  ["loading", "Loading", "requests that wait for pages"],
  ["parked", "Parked", "requests that gave their pages back"],
];

export function create(root) {
  const values = {};
  const seconds2 = {};
  root.append(h("dl", {}, ...FIGURES.map(([id, words, more]) => {
    values[id] = h("dd", { id: `figure-${id}` });
    seconds2[id] = h("dd", { class: "soft", text: more });
    return h("div", {}, h("dt", { text: words }), values[id], seconds2[id]);
  })));

  return function update({ snapshot, series, rangeS }) {
    const { sample, latency } = snapshot;
    const prompt = series.growth("prompt_tokens", rangeS);
    setText(values["hit-rate"], percent(prompt ? TIERS.reduce((sum, name) => sum + series.growth(name, rangeS), 0) / prompt : NaN));
    setText(values.tokens, rate(series.perSecond("generated_tokens", rangeS)));
    for (const kind of ["ttft", "itl"]) {
      const [median, p99] = [0.5, 0.99].map((q) => series.quantile(kind, q, rangeS, latency[kind]));
      setText(values[kind], seconds(median));
      setText(seconds2[kind], `median; p99 ${seconds(p99)}`);
    }
    for (const name of ["running", "queued", "loading", "parked"]) setText(values[name], String(sample[name]));
  };
}
