// Where the nodes of the prefix tree lie on the map. No document: positions only.
//
// A node's area is its tokens with all below it. Its own tokens are a band at one end of it, what follows them lies
// beside the band. What the map leaves out is an area as well, which is no node.

const GAP = 1;
const LEAST = 3; // pixels of a band, so that it can be seen and clicked

/** Rectangles for `items` ({ size }) in `area`, as square as possible (Bruls, Huizing, van Wijk 2000). */
export function squarify(items, area) {
  const total = items.reduce((sum, { size }) => sum + size, 0);
  const scale = total > 0 ? (area.width * area.height) / total : 0;
  const placed = [];
  let { x, y, width, height } = area;
  let rest = items.filter(({ size }) => size > 0).sort((a, b) => b.size - a.size);
  while (rest.length) {
    const side = Math.min(width, height);
    let row = [];
    let best = Infinity;
    for (const item of rest) {
      const longer = [...row, item];
      const worst = worstRatio(longer.map(({ size }) => size * scale), side);
      if (worst > best) break;
      row = longer;
      best = worst;
    }
    const rowArea = row.reduce((sum, { size }) => sum + size * scale, 0);
    const depth = side > 0 ? rowArea / side : 0;
    let offset = 0;
    for (const item of row) {
      const length = depth > 0 ? (item.size * scale) / depth : 0;
      placed.push(width >= height
        ? { item, x, y: y + offset, width: depth, height: length }
        : { item, x: x + offset, y, width: length, height: depth });
      offset += length;
    }
    if (width >= height) { x += depth; width -= depth; } else { y += depth; height -= depth; }
    rest = rest.slice(row.length);
  }
  return placed;
}

function worstRatio(areas, side) {
  const sum = areas.reduce((a, b) => a + b, 0);
  const [most, least] = [Math.max(...areas), Math.min(...areas)];
  return Math.max((side * side * most) / (sum * sum), (sum * sum) / (side * side * least));
}

/** Children of each node and of each root, by key "rank/number" and "rank/r-index". */
export function treeOf(engines) {
  const nodes = new Map();
  const roots = [];
  for (const [rank, engine] of Object.entries(engines)) {
    if (!engine.up) continue;
    for (const [index, root] of Object.entries(engine.map.roots)) {
      const entry = { key: `${rank}/r${index}`, rank: Number(rank), root, size: root.num_tokens, children: [] };
      nodes.set(entry.key, entry);
      if (root.num_tokens) roots.push(entry);
    }
    for (const [number, node] of Object.entries(engine.map.nodes)) {
      nodes.set(`${rank}/${number}`, { key: `${rank}/${number}`, rank: Number(rank), number: Number(number), node, size: node.below, children: [] });
    }
    for (const [number, node] of Object.entries(engine.map.nodes)) {
      const above = nodes.get(node.parent ? `${rank}/${node.parent}` : `${rank}/r${node.root}`);
      const entry = nodes.get(`${rank}/${number}`);
      entry.above = above;
      entry.namespace = engine.map.roots[node.root];
      above?.children.push(entry);
    }
  }
  return { nodes, roots };
}

/** [{ entry, band }]: parents before children. `band` is where the node's own tokens lie. */
export function layOut(roots, area, headHeight) {
  const tiles = [];
  for (const { item, ...box } of squarify(roots, area)) {
    const outer = shrunk(box, 2);
    const head = Math.min(headHeight, 0.4 * outer.height); // a small namespace shows its nodes
    tiles.push({ entry: item, band: { ...outer, height: head } });
    placeChildren(item, { ...outer, y: outer.y + head, height: outer.height - head }, tiles);
  }
  return tiles;
}

function placeChildren(entry, area, tiles) {
  if (area.width < 1 || area.height < 1) return;
  const known = entry.children.reduce((sum, { size }) => sum + size, 0);
  const own = entry.node?.tokens ?? 0;
  const items = [...entry.children];
  const rest = entry.size - own - known;
  if (rest > 0) items.push({ key: `${entry.key}/rest`, size: rest, isRest: true, above: entry, children: [] });
  for (const { item, ...box } of squarify(items, area)) {
    if (item.isRest) {
      tiles.push({ entry: item, band: shrunk(box, GAP) });
      continue;
    }
    const share = item.size ? item.node.tokens / item.size : 1;
    const isWide = box.width >= box.height;
    const length = isWide ? box.width : box.height;
    const band = item.children.length || share < 1 ? Math.min(length, Math.max(LEAST, share * length)) : length;
    tiles.push({ entry: item, band: shrunk(isWide ? { ...box, width: band } : { ...box, height: band }, GAP) });
    placeChildren(item, isWide
      ? { ...box, x: box.x + band, width: box.width - band }
      : { ...box, y: box.y + band, height: box.height - band }, tiles);
  }
}

const shrunk = ({ x, y, width, height }, by) => ({ x, y, width: Math.max(1, width - by), height: Math.max(1, height - by) });
