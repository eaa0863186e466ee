// The page: takes the stream, keeps the series, has every panel show the newest state.

import { byId, setText } from "./dom.js";
import { Series } from "./series.js";
import { onKeyNeeded, setKey } from "./server.js";
import { follow, patched } from "./stream.js";
import * as control from "./panels/control.js";
import * as copies from "./panels/copies.js";
import * as engines from "./panels/engines.js";
import * as figures from "./panels/figures.js";
import * as flush from "./panels/flush.js";
import * as hits from "./panels/hits.js";
import * as latency from "./panels/latency.js";
import * as log from "./panels/log.js";
import * as notices from "./panels/notices.js";
import * as pins from "./panels/pins.js";
import * as prefixes from "./panels/prefixes.js";
import * as tenants from "./panels/tenants.js";
import * as tiers from "./panels/tiers.js";
import * as traffic from "./panels/traffic.js";
import { startScheme } from "./scheme.js";

const PANELS = { notices, figures, tiers, hits, traffic, latency, prefixes, flush, control, tenants, pins, copies, engines, log };

// What panels share. `selected`: a node of the map {rank, number}; `cut`: which nodes the last dry run would cut.
const page = {
  snapshot: null, series: new Series(), rangeS: 300, selected: null, cut: null,
  show: () => draw(),
};
const panels = Object.entries(PANELS).map(([id, panel]) => panel.create(byId(id), page));

function draw() {
  if (page.snapshot === null) return;
  for (const update of panels) update(page);
  showStatus();
}

function showStatus() {
  const { server, engines: all } = page.snapshot;
  setText(byId("model"), [server.model, server.device, server.dtype].filter(Boolean).join(" · "));
  const found = Object.values(all);
  const down = found.filter((engine) => !engine.up);
  if (found.length && down.length === found.length) setStatus("bad", down[0].message);
  else if (down.length) setStatus("bad", `${down.length} of ${found.length} engines do not answer`);
  else if (found.some((engine) => engine.paused)) setStatus("held", "Paused");
  else if (found.some((engine) => engine.held_by.length)) setStatus("held", "Requests are held");
  else if (server.serving && found.some(notices.storeTrouble)) setStatus("held", "Serving, the store fails");
  else setStatus(server.serving ? "good" : "held", server.serving ? "Serving" : "Not ready");
}

function setStatus(kind, words) {
  const status = byId("status");
  status.dataset.kind = kind;
  setText(status, words);
}

function askForKey(why) {
  const dialog = byId("key");
  setText(byId("key-why"), why);
  byId("key-value").value = "";
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      if (byId("key-value").value) setKey(byId("key-value").value);
      resolve();
    }, { once: true });
    if (!dialog.open) dialog.showModal();
  });
}

byId("range").addEventListener("change", (event) => {
  page.rangeS = Number(event.target.value);
  draw();
});
window.addEventListener("resize", () => draw());
startScheme(byId("scheme"), draw);
onKeyNeeded(askForKey);

follow({
  whole({ snapshot, history }) {
    page.snapshot = snapshot;
    page.series.load(history);
    page.series.push(snapshot.sample);
    draw();
  },
  patch(change) {
    page.snapshot = patched(page.snapshot, change);
    page.series.push(page.snapshot.sample);
    if (!document.hidden) draw();
  },
  lost: (words) => setStatus("bad", words),
  async refused(response) {
    setStatus("held", "A key is needed");
    const body = await response.json().catch(() => null);
    await askForKey(body?.error?.message ?? "");
  },
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) draw(); });
