"""Draws tiers.svg, the picture in README.md: a flush cuts a prefix while a request goes on, and the tiers below.

Run `python docs/pictures/draw_tiers.py` after a change; a test compares the file with what this script makes.
The numbers under the tiers are counted from the squares, so the picture obeys the rule that it shows.
"""

from pathlib import Path

PICTURE = Path(__file__).with_name("tiers.svg")
WIDTH, HEIGHT = 960, 586
SIDE, PITCH = 18, 23  # of a page's square, and from one square to the next

STYLE = """
  .card { fill: #fbfcfe; stroke: #d5dce6 } .basin { fill: #eef3f9; stroke: #c3cfdd } .water { fill: #dbe8f6 }
  text { font-family: -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", Helvetica, Arial, sans-serif;
         font-size: 13px; fill: #1f2a37 }
  .title { font-size: 15px; font-weight: 600 } .soft { fill: #57667a } .small { font-size: 12px }
  .code { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 13px }
  .link { fill: none; stroke: #9aa9bb; stroke-width: 2 } .cutlink { stroke-dasharray: 4 4 }
  .tree { fill: #2f7dd1 } .stored { fill: #93bde9 } .private { fill: #1c9c76 } .retired { fill: url(#hatch) }
  .retired { stroke: #d9822b } .transfer { fill: #8b5fd0 } .free { fill: none; stroke: #a9b6c6 }
  .gone { fill: none; stroke: #d9822b; stroke-dasharray: 3 3 }
  .hatchground { fill: #fbe3c6 } .hatchline { stroke: #d9822b; stroke-width: 3 }
  .t-tree { fill: #1f66b3 } .t-private { fill: #0f7a5a } .t-retired { fill: #a85a10 } .t-transfer { fill: #7040bd }
  .cut { fill: none; stroke: #cf2f48; stroke-width: 2.5; stroke-linecap: round } .t-cut { fill: #b91f39 }
  .pill { fill: #fdecef; stroke: #cf2f48 } .flow { fill: none; stroke: #8b5fd0; stroke-width: 1.6 }
  .head { fill: #8b5fd0 } .newest { animation: write 1.6s ease-in-out infinite }
  @keyframes write { 0%, 100% { fill-opacity: 1 } 50% { fill-opacity: .25 } }
  @media (prefers-reduced-motion: reduce) { .newest { animation: none } }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0f151d; stroke: #2b3644 } .basin { fill: #151e29; stroke: #36455a } .water { fill: #1a2a3e }
    text { fill: #e4eaf2 } .soft { fill: #9fb0c3 } .link { stroke: #5c6d82 } .free { stroke: #4d5e73 }
    .tree { fill: #4a97ea } .stored { fill: #2c5c92 } .private { fill: #2fbe92 } .transfer { fill: #a683e8 }
    .retired, .gone { stroke: #f0a04b }
    .hatchground { fill: #4a3114 } .hatchline { stroke: #f0a04b } .t-tree { fill: #7db8f5 } .t-private { fill: #5ad6b0 }
    .t-retired { fill: #f5b26b } .t-transfer { fill: #c3a8f2 } .cut, .pill { stroke: #ff6b81 } .t-cut { fill: #ff8fa0 }
    .pill { fill: #38151c } .flow { stroke: #a683e8 } .head { fill: #a683e8 }
  }"""

LEGEND = {  # owner of a page: where its line begins, its words
    "tree": (36, "tree: shared"),
    "retired": (168, "retired: flushed, still read"),
    "private": (376, "private: one request"),
    "transfer": (556, "transfer: copy arriving"),
    "free": (752, "free"),
}


def page(x: float, y: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{SIDE}" height="{SIDE}" rx="4" class="{kind}"/>'


def pages(x: float, y: float, num_pages: int, kind: str) -> str:
    return "".join(page(x + PITCH * i, y, kind) for i in range(num_pages))


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def link(x: float, y: float, to_x: float, to_y: float, kind: str = "link") -> str:
    """A branch of the tree: level at both ends."""
    middle = (x + to_x) / 2
    return f'<path d="M{x:g} {y:g}C{middle:g} {y:g} {middle:g} {to_y:g} {to_x:g} {to_y:g}" class="{kind}"/>'


def scissors(x: float, y: float) -> str:
    """A line that cuts at (x, y) from below, with scissors at its lower end."""
    return (
        f'<g transform="translate({x:g} {y:g})"><path d="M0 -26V16" class="cut" stroke-dasharray="1 6"/>'
        '<path d="M-5 16L4 38M5 16L-4 38" class="cut"/>'
        '<circle cx="-6" cy="43" r="5" class="cut"/><circle cx="6" cy="43" r="5" class="cut"/></g>'
    )


TRUNK, KEPT, CUT, ANSWER, FREED = 6, 7, 6, 4, 3  # pages of each part of the tree


def tree() -> list[str]:
    half = SIDE / 2
    kept_y, cut_y, freed_y = 82, 142, 202
    trunk_end, branch_x = 36 + PITCH * TRUNK - PITCH + SIDE, 262
    cut_end, child_x, note_x = branch_x + PITCH * CUT - PITCH + SIDE, 452, 624
    return [
        text(36, 40, "Prefix tree", "title"),
        text(142, 40, "prompts that begin alike share pages, also while they run", "soft"),
        link(trunk_end, cut_y + half, branch_x, kept_y + half),
        link(trunk_end, cut_y + half, branch_x, cut_y + half, "link cutlink"),
        link(cut_end, cut_y + half, child_x, cut_y + half),
        link(cut_end, cut_y + half, child_x, freed_y + half, "link cutlink"),
        pages(36, cut_y, TRUNK, "tree"),
        text(36, cut_y - 10, "system prompt"),
        pages(branch_x, kept_y, KEPT, "tree"),
        text(branch_x, kept_y - 8, "conversation"),
        text(note_x, kept_y + 14, "stays: the next turn hits it", "t-tree"),
        pages(branch_x, cut_y, CUT, "retired"),
        text(branch_x, cut_y - 8, "a document that changed"),
        pages(child_x, cut_y, ANSWER - 1, "private"),
        page(child_x + PITCH * (ANSWER - 1), cut_y, "private newest"),
        text(child_x, cut_y - 8, "request 7, answering"),
        text(note_x, cut_y + 5, "goes on, and reads its retired pages;", "t-retired"),
        text(note_x, cut_y + 23, "no later request hits them", "t-retired"),
        pages(child_x, freed_y, FREED, "gone"),
        text(note_x, freed_y + 14, "not in use: free at once", "soft"),
        scissors(222, cut_y + half),
        '<rect x="36" y="204" width="304" height="30" rx="8" class="pill"/>',
        text(50, 224, "POST /flush_cache?mode=now&amp;prefix=…", "code t-cut"),
    ]


def basin(x: float, num_columns: int, name: str, what: str, owned: dict[str, int], note: str = "") -> list[str]:
    """A tier as a basin that is filled from below, with its books under it."""
    top, num_rows = 348, 5
    width, height = PITCH * num_columns + 23, PITCH * num_rows + 22
    num_used, num_free = sum(owned.values()), num_columns * num_rows - sum(owned.values())
    water = PITCH * -(-num_used // num_columns) + 13
    kinds = [owner for owner, count in owned.items() for _ in range(count)] + ["free"] * num_free
    bottom = top + height
    wave = "".join(f"q{width / 16:g} {-4 if i % 2 else 4} {width / 8:g} 0" for i in range(8))
    squares = [
        page(x + 14 + PITCH * (i % num_columns), bottom - 11 - SIDE - PITCH * (i // num_columns), kind)
        for i, kind in enumerate(kinds)
    ]
    sums = [f'<tspan class="t-{owner}">{count}</tspan>' for owner, count in {**owned, "free": num_free}.items()]
    books = f"{' + '.join(sums)} = {num_columns * num_rows} pages"
    return [
        f'<text x="{x}" y="{top - 12}"><tspan font-weight="600">{name}</tspan><tspan class="soft small" dx="10">{what}'
        "</tspan></text>",
        f'<path d="M{x:g} {top}V{bottom - 10}q0 10 10 10H{x + width - 10:g}q10 0 10 -10V{top}" class="basin"/>',
        f'<path d="M{x + 1:g} {bottom - water}{wave}V{bottom - 10}q0 9 -9 9H{x + 10:g}q-9 0 -9 -9z" class="water"'
        f' transform="translate({x:g} 0) scale({(width - 2) / width:.5f} 1) translate({-x:g} 0)"/>',
        *squares,
        text(x + width / 2, bottom + 20, note or books, "small", "middle"),
    ]


def flow(x: float, y: float, words: str, to_right: bool) -> list[str]:
    tip, tail = (x + 22, x - 22) if to_right else (x - 22, x + 22)
    back = -7 if to_right else 7
    return [
        text(x, y - 7, words, "small t-transfer", "middle"),
        f'<path d="M{tail:g} {y}H{tip + back:g}" class="flow"/>',
        f'<path d="M{tip:g} {y}l{back} -4v8z" class="head"/>',
    ]


def tiers() -> list[str]:
    device = {"tree": TRUNK + KEPT, "retired": CUT, "private": ANSWER, "transfer": 2}
    return [
        text(36, 292, "Tiers", "title"),
        text(142, 292, "each page has exactly one owner, so the counts add up at every moment", "soft"),
        *basin(36, 8, "device", "GPU or CPU memory", device),
        *flow(276, 402, "offload", True),
        *flow(276, 440, "restore", False),
        *basin(316, 10, "host", "RAM beside it", {"tree": 25, "transfer": 3}),
        *flow(602, 402, "persist", True),
        *flow(602, 440, "prefetch", False),
        *basin(642, 11, "storage", "folder, Redis, Valkey", {"stored": 41}, "outlives the server, shared by several"),
    ]


def legend() -> list[str]:
    return [page(x, 546, owner) + text(x + 25, 560, words, "small") for owner, (x, words) in LEGEND.items()]


def draw() -> str:
    label = "A flush cuts a prefix out of the tree while a request goes on; pages on device, host and storage by owner"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
        f"<style>{STYLE}\n</style>",
        '<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="7" height="7" class="hatchground"/><path d="M0 0V7" class="hatchline"/></pattern>',
        f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="12" class="card"/>',
        *tree(),
        *tiers(),
        *legend(),
        "</svg>\n",
    ])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
