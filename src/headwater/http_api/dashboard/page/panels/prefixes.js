// The prefix tree as a map. Every node is a button: Tab enters the map, arrows move in it, Enter selects.

import { layOut, treeOf } from "../charts/tree_map.js";
import { h, keepList, setText } from "../dom.js";
import { namespace, plural, short, count } from "../format.js";
import { createDetails } from "./node_details.js";

const HEAD = 20;
const HITS = [0, 1, 3, 10, 32]; // from so many hits on, a node has the next colour
const LEVELS = ["0", "1–2", "3–9", "10–31", "32 or more"];

export function create(root, page) {
  const map = h("div", { class: "map", role: "group", "aria-label": "Map of the prefix tree. Arrows move, Enter selects." });
  const empty = h("p", { class: "soft empty", text: "Nothing is cached." });
  const facts = h("p", { class: "soft" });
  const cut = h("p", { class: "cut-note", role: "status" });
  const key = h("ul", { class: "legend" }, h("li", { text: "Hits:" }), ...LEVELS.map((words, level) =>
    h("li", {}, h("i", { class: `swatch hits-${level}` }), words)),
  h("li", {}, h("i", { class: "swatch rest" }), "not shown"), h("li", {}, h("i", { class: "swatch cut" }), "would be cut"));
  root.append(map, empty, key, facts, cut);
  const updateDetails = createDetails(root, page);
  let shown = {};
  let current = null; // key of the tile that Tab reaches

  map.addEventListener("keydown", (event) => {
    const target = neighbour(shown.tiles ?? [], current, event.key);
    if (target) {
      event.preventDefault();
      current = target.entry.key;
      for (const [name, element] of map.known) element.tabIndex = name === current ? 0 : -1;
      map.known.get(current)?.focus();
    }
  });

  return function update({ snapshot, selected, cut: wouldCut }) {
    const maps = Object.values(snapshot.engines).map((engine) => engine.map);
    const width = root.clientWidth;
    const isSame = shown.width === width && shown.selected === selected && shown.cut === wouldCut
      && shown.maps?.length === maps.length && maps.every((each, index) => each === shown.maps[index]);
    if (!isSame) {
      const tree = treeOf(snapshot.engines);
      map.hidden = !(empty.hidden = tree.roots.length > 0);
      const tiles = layOut(tree.roots, { x: 0, y: 0, width: map.clientWidth, height: map.clientHeight }, HEAD);
      if (!tiles.some(({ entry }) => entry.key === current)) current = tiles[0]?.entry.key ?? null;
      shown = { width, selected, cut: wouldCut, maps, tree, tiles };
      const severalEngines = maps.length > 1;
      keepList(map, tiles.map((tile) => [tile.entry.key, tile]), makeTile(page, (name) => { current = name; }),
        (element, tile) => showTile(element, tile, { selected, wouldCut, current, severalEngines }));
      describe(facts, cut, maps, tiles, wouldCut);
    }
    updateDetails(page, shown.tree);
  };
}

function makeTile(page, onFocus) {
  return (tile, key) => {
    if (tile.entry.isRest) return h("div", { class: "tile rest" });
    const element = h("button", { type: "button", class: "tile", onfocus: () => onFocus(key) }, h("span"));
    element.addEventListener("click", () => {
      const { entry } = element.tile;
      page.selected = page.selected === entry.key ? null : entry.key;
      page.show();
    });
    return element;
  };
}

function showTile(element, tile, { selected, wouldCut, current, severalEngines }) {
  const { entry, band } = tile;
  element.tile = tile;
  for (const [name, value] of [["left", band.x], ["top", band.y], ["width", band.width], ["height", band.height]]) {
    element.style[name] = `${value.toFixed(1)}px`;
  }
  const isCut = wouldCut?.(entry.isRest ? entry.above : entry) ?? false;
  if (entry.isRest) {
    element.className = `tile rest${isCut ? " cut" : ""}`;
    return;
  }
  const isRoot = Boolean(entry.root);
  const level = isRoot ? "root" : `hits-${HITS.findLastIndex((least) => entry.node.hits >= least)}`;
  element.className = `tile ${level}${isCut ? " cut" : ""}${selected === entry.key ? " selected" : ""}`;
  element.tabIndex = entry.key === current ? 0 : -1;
  element.setAttribute("aria-pressed", String(selected === entry.key));
  const name = nameOf(entry, severalEngines);
  setText(element.firstChild, band.width > 40 && band.height > 13 ? (isRoot ? `${name} · ${short(entry.size)}` : entry.node.text || short(entry.node.tokens)) : "");
  const words = `${name}: ${describeEntry(entry)}${isCut ? ", would be cut" : ""}`;
  element.setAttribute("aria-label", words);
  element.title = entry.node?.text ? `${words}\n${entry.node.text}` : words;
}

export function nameOf(entry, severalEngines) {
  const where = severalEngines ? `engine ${entry.rank}, ` : "";
  return entry.root ? `${where}${namespace(entry.root.cache_salt, entry.root.extra_key)}` : `${where}node ${entry.number}`;
}

function describeEntry({ root, node, size }) {
  if (root) return `${plural(root.num_tokens, "token")} in ${plural(root.num_nodes, "node")}`;
  const below = size > node.tokens ? `, ${count(size - node.tokens)} below` : "";
  return `${plural(node.tokens, "token")}${below}, ${plural(node.hits, "hit")}${node.pins ? `, ${plural(node.pins, "pin")}` : ""}`;
}

function describe(facts, cut, maps, tiles, wouldCut) {
  const leftOut = maps.reduce((sum, each) => sum + (each?.left_out ?? 0), 0);
  const slow = Math.max(0, ...maps.map((each) => each?.taken_ms ?? 0));
  const age = slow > 1500 ? ` The map of a tree this large is made in ${Math.round(slow / 1000)} s.` : "";
  setText(facts, leftOut > 0 ? `${plural(leftOut, "smaller or deeper node")} not shown.${age}` : age);
  const number = wouldCut ? tiles.filter(({ entry }) => entry.node && wouldCut(entry)).length : 0;
  setText(cut, wouldCut ? `The flush would cut ${plural(number, "node")} on this map.` : "");
}

function neighbour(all, current, key) {
  const tiles = all.filter(({ entry }) => !entry.isRest);
  const index = tiles.findIndex(({ entry }) => entry.key === current);
  if (index < 0) return undefined;
  const { entry } = tiles[index];
  if (key === "ArrowRight") return tiles[index + 1];
  if (key === "ArrowLeft") return tiles[index - 1];
  if (key === "ArrowDown") return tiles.find((tile) => tile.entry.above === entry);
  if (key === "ArrowUp") return tiles.find((tile) => tile.entry === entry.above);
  if (key === "Home") return tiles[0];
  return key === "End" ? tiles.at(-1) : undefined;
}
