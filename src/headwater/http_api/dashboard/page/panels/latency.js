// Percentiles of the first and of the next tokens, from the histograms of /metrics.

import { createPlot } from "../charts/plot.js";
import { h, setText } from "../dom.js";
import { axisSeconds, seconds } from "../format.js";

const KINDS = [["ttft", "First token (TTFT)"], ["itl", "Next token (ITL)"]];
const QUANTILES = [[0.5, "p50"], [0.9, "p90"], [0.99, "p99"]];

export function create(root) {
  const cells = {};
  const draws = {};
  for (const [kind, words] of KINDS) {
    cells[kind] = QUANTILES.map(([, name]) => ({ name, value: h("span", { class: "value", id: `${kind}-${name}` }) }));
    root.append(h("h3", { text: words }));
    draws[kind] = createPlot(root, {
      series: QUANTILES.map(([, key]) => ({ key, words: key })), label: words,
    });
  }
  return function update({ snapshot, series, rangeS }) {
    for (const [kind] of KINDS) {
      const bounds = snapshot.latency[kind];
      if (!bounds) continue;
      const newest = Object.fromEntries(QUANTILES.map(([q, name]) => [name, seconds(series.quantile(kind, q, rangeS, bounds))]));
      for (const { name, value } of cells[kind]) setText(value, newest[name]);
      draws[kind]({
        points: Object.fromEntries(QUANTILES.map(([q, name]) => [name, series.quantiles(kind, q, rangeS, bounds)])),
        rangeS, now: series.last.t, format: axisSeconds, newest,
        summary: Object.entries(newest).map((each) => each.join(" ")).join(", "),
      });
    }
  };
}
