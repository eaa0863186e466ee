// A tier as a vessel: what its pages are used for, from the bottom up.

import { svg } from "../dom.js";

const WIDTH = 64;
const HEIGHT = 132;

/** `owners` from the bottom up; the rest of the vessel is free. */
export function createReservoir(parent, owners) {
  const picture = svg("svg", { class: "reservoir", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const layers = owners.map((owner) => svg("rect", { class: `fill c-${owner}`, x: 1, width: WIDTH - 2 }));
  picture.append(
    svg("rect", { class: "vessel", x: 0.5, y: 0.5, width: WIDTH - 1, height: HEIGHT - 1, rx: 5 }),
    ...layers,
    svg("rect", { class: "rim", x: 0.5, y: 0.5, width: WIDTH - 1, height: HEIGHT - 1, rx: 5 }),
  );
  parent.append(picture);

  return function draw({ amounts, capacity, label }) {
    picture.setAttribute("aria-label", label);
    let bottom = HEIGHT - 1;
    owners.forEach((owner, index) => {
      const share = capacity ? (amounts[owner] ?? 0) / capacity : 0;
      const height = share > 0 ? Math.max(1.5, share * (HEIGHT - 2)) : 0; // a single page is seen
      bottom = Math.max(1, bottom - height);
      layers[index].setAttribute("y", bottom.toFixed(1));
      layers[index].setAttribute("height", height.toFixed(1));
    });
  };
}
