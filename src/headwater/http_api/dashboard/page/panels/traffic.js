// Tokens a second, and requests by state.

import { createPlot, niceTop } from "../charts/plot.js";
import { rate, short } from "../format.js";

const TOKENS = [["generated", "generated", "generated_tokens"], ["prompt", "prompts", "prompt_tokens"]];
const STATES = [["running", "running"], ["queued", "queued"], ["loading", "loading"], ["parked", "parked"]];

export function create(root) {
  const drawTokens = createPlot(root, { series: TOKENS.map(([key, words]) => ({ key, words })), label: "Tokens a second" });
  const drawStates = createPlot(root, { series: STATES.map(([key, words]) => ({ key, words })), label: "Requests by state" });
  return function update({ snapshot, series, rangeS }) {
    const now = series.last.t;
    const newest = Object.fromEntries(TOKENS.map(([key, , name]) => [key, `${rate(series.perSecond(name, 5))}/s`]));
    drawTokens({
      points: Object.fromEntries(TOKENS.map(([key, , name]) => [key, series.rates(name, rangeS)])),
      rangeS, now, format: short, newest, summary: Object.entries(newest).map((each) => each.join(" ")).join(", "),
    });
    const highest = Math.max(0, ...STATES.flatMap(([key]) => series.gauge(key, rangeS).map(([, value]) => value ?? 0)));
    const states = Object.fromEntries(STATES.map(([key]) => [key, String(snapshot.sample[key])]));
    drawStates({
      points: Object.fromEntries(STATES.map(([key]) => [key, series.gauge(key, rangeS)])),
      rangeS, now, format: short, top: Math.max(2, niceTop(highest)), newest: states, summary: Object.entries(states).map((each) => each.join(" ")).join(", "),
    });
  };
}
