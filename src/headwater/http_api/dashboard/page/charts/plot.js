// A chart over time: lines, or areas on top of each other. Drawn in pixels, so lines and letters keep their size.

import { h, setText, svg } from "../dom.js";

const LEFT = 46;
const BOTTOM = 16;
const TOP = 6;

/** `series`: [{ key, words }], which name the classes of colours and the legend. */
export function createPlot(parent, { series, label, areas = false, legend = true }) {
  const picture = svg("svg", { class: "plot", role: "img", "aria-label": label });
  const grid = svg("g", { class: "grid" });
  const paths = new Map(series.map(({ key }) => [key, svg("path", { class: `${areas ? "area" : "line"} c-${key}` })]));
  picture.append(grid, ...paths.values());
  const values = new Map();
  const key = h("ul", { class: "legend" }, ...series.map((each) => {
    const value = h("span", { class: "value" });
    values.set(each.key, value);
    return h("li", {}, h("i", { class: `swatch c-${each.key}` }), each.words, " ", value);
  }));
  parent.append(picture, ...(legend ? [key] : []));

  /** `points`: by key, [[t, value or null]]. `newest`: by key, what the legend says. */
  return function draw({ points, rangeS: wantedS, now, format, top, newest = {}, summary }) {
    const rangeS = spanS(points, wantedS, now);
    const width = picture.clientWidth || 300;
    const height = picture.clientHeight || 110;
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.setAttribute("aria-label", `${label}. ${summary ?? ""}`);
    const stacks = areas ? stacked(series, points) : points;
    const highest = top ?? niceTop(Math.max(0, ...Object.values(stacks).flat().map((each) => each.at(-1) ?? 0)));
    const x = (t) => LEFT + (width - LEFT - 2) * (1 - (now - t) / (1000 * rangeS));
    const y = (value) => TOP + (height - TOP - BOTTOM) * (1 - Math.min(1, value / highest));
    drawGrid(grid, { width, height, y, highest, format, rangeS });
    for (const { key: name } of series) {
      paths.get(name).setAttribute("d", areas ? areaPath(stacks[name] ?? [], x, y) : linePath(stacks[name] ?? [], x, y));
      if (newest[name] !== undefined) setText(values.get(name), newest[name]);
    }
  };
}

function drawGrid(grid, { width, height, y, highest, format, rangeS }) {
  const rows = [0, highest / 2, highest].map((value) => [
    svg("line", { x1: LEFT, x2: width, y1: y(value), y2: y(value) }),
    svg("text", { x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end", text: format(value) }),
  ]);
  const ago = rangeS < 120 ? `${rangeS} s` : rangeS < 3600 ? `${Math.round(rangeS / 60)} min` : `${rangeS / 3600} h`;
  grid.replaceChildren(
    ...rows.flat(),
    svg("text", { x: LEFT, y: height - 3, text: `${ago} ago` }),
    svg("text", { x: width, y: height - 3, "text-anchor": "end", text: "now" }),
  );
}

function linePath(points, x, y) {
  let pen = "M";
  let path = "";
  for (const [t, value] of points) {
    if (value === null) {
      pen = "M";
      continue;
    }
    path += `${pen}${x(t).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  }
  return path;
}

/** [[t, low, high]] as one closed shape for each stretch without a gap. */
function areaPath(bands, x, y) {
  const stretches = [[]];
  for (const band of bands) {
    if (band[2] === null) stretches.push([]);
    else stretches.at(-1).push(band);
  }
  return stretches.filter((stretch) => stretch.length > 1).map((stretch) => {
    const above = stretch.map(([t, , high]) => `${x(t).toFixed(1)} ${y(high).toFixed(1)}`);
    const below = stretch.map(([t, low]) => `${x(t).toFixed(1)} ${y(low).toFixed(1)}`).reverse();
    return `M${above.join("L")}L${below.join("L")}Z`;
  }).join("");
}

function stacked(series, points) {
  const sums = new Map();
  return Object.fromEntries(series.map(({ key }) => [key, (points[key] ?? []).map(([t, value]) => {
    const low = sums.get(t) ?? 0;
    if (value === null) return [t, null, null];
    sums.set(t, low + value);
    return [t, low, low + value];
  })]));
}

/** A page that was opened a moment ago has little to show: the axis grows with it, up to the range. */
function spanS(points, wantedS, now) {
  const oldest = Math.min(now, ...Object.values(points).flatMap((each) => (each.length ? [each[0][0]] : [])));
  return [60, 120, 300, 600, 900, 1800, 3600].find((span) => span >= wantedS || now - oldest <= 1000 * span) ?? wantedS;
}

/** 1, 2, 4, 6 or 8 times a power of ten, above `value`. */
export function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * ([1, 2, 4, 6, 8].find((step) => step * power >= value) ?? 10);
}
