// Which share of the prompt tokens came from which tier.

import { createPlot } from "../charts/plot.js";
import { h, setText } from "../dom.js";
import { percent, short } from "../format.js";

const TIERS = [["device", "device"], ["host", "host"], ["storage", "storage"]];

export function create(root) {
  const bar = h("div", { class: "bar", role: "img" });
  const parts = Object.fromEntries(TIERS.map(([tier]) => [tier, h("span", { class: `c-${tier}` })]));
  bar.append(...Object.values(parts));
  const since = h("p", { class: "soft" });
  root.append(bar);
  const draw = createPlot(root, {
    series: TIERS.map(([key, words]) => ({ key, words })), label: "Share of prompt tokens found, by tier", areas: true,
  });
  root.append(since);
  return function update({ snapshot, series, rangeS }) {
    const prompt = series.growth("prompt_tokens", rangeS);
    const shares = Object.fromEntries(TIERS.map(([tier]) => [
      tier, prompt ? series.growth(`cached_tokens_${tier}`, rangeS) / prompt : 0,
    ]));
    for (const [tier, share] of Object.entries(shares)) parts[tier].style.width = `${100 * share}%`;
    const summary = TIERS.map(([tier]) => `${tier} ${percent(shares[tier])}`).join(", ");
    bar.setAttribute("aria-label", prompt ? `Found in the range: ${summary}` : "No prompts in the range");
    draw({
      points: Object.fromEntries(TIERS.map(([tier]) => [tier, series.ratio([`cached_tokens_${tier}`], "prompt_tokens", rangeS)])),
      rangeS, now: series.last.t, format: (share) => `${Math.round(100 * share)} %`, top: 1,
      newest: Object.fromEntries(TIERS.map(([tier]) => [tier, prompt ? percent(shares[tier]) : "–"])), summary,
    });
    const { sample } = snapshot;
    const cached = TIERS.reduce((sum, [tier]) => sum + sample[`cached_tokens_${tier}`], 0);
    setText(since, `${short(prompt)} prompt tokens in the range; since the start ${percent(cached / sample.prompt_tokens)} of ${short(sample.prompt_tokens)}.`);
  };
}
