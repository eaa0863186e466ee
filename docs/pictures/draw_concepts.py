"""Draws prefix.svg and flush-modes.svg, the pictures of concepts.md.

Run `python docs/pictures/draw_concepts.py` after a change; a test compares the files with what this script makes.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
SIDE, PITCH = 18, 23  # of a page's square, and from one square to the next

STYLE = """
  .card { fill: #fbfcfe; stroke: #d5dce6 } .lane { fill: #eef3f9 }
  text { font-family: -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", Helvetica, Arial, sans-serif;
         font-size: 13px; fill: #1f2a37 }
  .title { font-size: 15px; font-weight: 600 } .soft { fill: #57667a; font-size: 12px }
  .code { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 12px }
  .link { fill: none; stroke: #9aa9bb; stroke-width: 2 } .tree { fill: #2f7dd1 } .private { fill: #1c9c76 }
  .run { fill: #1c9c76 } .wait { fill: #c9d3df } .flush { stroke: #cf2f48; stroke-width: 2.5 } .t-flush { fill: #b91f39 }
  .old { fill: #d9822b } .t-old { fill: #a85a10 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0f151d; stroke: #2b3644 } .lane { fill: #151e29 }
    text { fill: #e4eaf2 } .soft { fill: #9fb0c3 } .link { stroke: #5c6d82 } .tree { fill: #4a97ea }
    .private, .run { fill: #2fbe92 } .wait { fill: #36455a } .flush { stroke: #ff6b81 } .t-flush { fill: #ff8fa0 }
    .old { fill: #f0a04b } .t-old { fill: #f5b26b }
  }"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, round_by: float = 4) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_by:g}" class="{kind}"/>'


def pages(x: float, y: float, count: int, kind: str) -> str:
    return "".join(box(x + PITCH * index, y, SIDE, SIDE, kind) for index in range(count))


def link(x: float, y: float, to_x: float, to_y: float) -> str:
    middle = (x + to_x) / 2
    return f'<path d="M{x:g} {y:g}C{middle:g} {y:g} {middle:g} {to_y:g} {to_x:g} {to_y:g}" class="link"/>'


def picture(width: int, height: int, label: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    card = box(1, 1, width - 2, height - 2, "card", 10)
    return "\n".join([head, f"<style>{STYLE}\n</style>", card, *parts, "</svg>"]) + "\n"


def prefix() -> str:
    """Three prompts as paths of one tree."""
    branches = (  # y, shared pages, private pages, prompt, what it found
        (90, 3, 0, "What is a lease?", "7 pages cached, computes nothing but the last token"),
        (150, 2, 1, "What is a page?", "6 pages cached, computes one"),
        (210, 0, 3, "Bonjour !", "4 pages cached, computes three"),
    )
    parts = [
        text(24, 34, "One tree for all prompts of a namespace", "title"),
        text(24, 76, "system prompt", "soft"),
        pages(24, 140, 4, "tree"),
    ]
    end = 24 + PITCH * 4 - 5
    for y, num_shared, num_private, prompt, found in branches:
        parts.append(link(end, 149, 190, y + 9))
        parts.append(pages(190, y, num_shared, "tree"))
        parts.append(pages(190 + PITCH * num_shared, y, num_private, "private"))
        parts.append(text(280, y + 8, prompt, "code"))
        parts.append(text(280, y + 24, found, "soft"))
    legend = [
        box(24, 252, 14, 14, "tree"), text(44, 264, "in the tree: every request with this beginning uses it", "soft"),
        box(378, 252, 14, 14, "private"), text(398, 264, "private: being computed, then it joins the tree", "soft"),
    ]  # fmt: skip
    return picture(680, 286, "Three prompts share the pages of their common beginning", parts + legend)


def flush_modes() -> str:
    """Two running requests and a new one, under each mode of a flush that arrives at the same moment."""
    arrives, left, right = 250, 130, 650
    ends = (430, 520)  # of the two requests that run
    lanes = (  # mode, when it answers, from when the new request runs, words
        ("idle", 520, 520, "waits until nothing runs; with hold, new requests wait meanwhile"),
        ("now", 258, 290, "cuts the tree and answers; running requests go on with their pages"),
        ("drain", 520, 290, "cuts like now, answers when the last old page has been given back"),
    )
    parts = [text(24, 34, "When a flush answers", "title")]
    for row, (mode, answers, runs_from, words) in enumerate(lanes):
        y = 60 + row * 92
        parts += [text(24, y + 14, mode, "code"), text(left, y + 72, words, "soft")]
        for index, end in enumerate(ends):
            lane_y = y + index * 14
            parts.append(box(left, lane_y, right - left, 10, "lane", 3))
            cut = end if mode == "idle" else arrives
            parts.append(box(left, lane_y, cut - left, 10, "run", 3))
            if cut < end:
                parts.append(box(cut, lane_y, end - cut, 10, "old", 3))
        parts.append(box(left, y + 28, right - left, 10, "lane", 3))
        if runs_from > 290:
            parts.append(box(290, y + 28, runs_from - 290, 10, "wait", 3))
        parts.append(box(runs_from, y + 28, right - runs_from, 10, "run", 3))
        parts.append(f'<path d="M{arrives} {y - 6}V{y + 46}" class="flush" stroke-dasharray="3 4"/>')
        parts.append(f'<path d="M{answers} {y - 6}V{y + 46}" class="flush"/>')
        parts.append(text(answers + 6, y + 56, "answer", "soft t-flush"))
    y = 60 + len(lanes) * 92
    parts += [
        box(24, y, 14, 14, "run"), text(44, y + 12, "a request runs", "soft"),
        box(150, y, 14, 14, "old"), text(170, y + 12, "runs on flushed pages", "soft"),
        box(320, y, 14, 14, "wait"), text(340, y + 12, "a new request waits", "soft"),
        text(480, y + 12, "dashed: the flush arrives", "soft t-flush"),
    ]  # fmt: skip
    return picture(680, y + 34, "The modes idle, now and drain of a flush on a time line", parts)


DRAWN = {"prefix.svg": prefix, "flush-modes.svg": flush_modes}

if __name__ == "__main__":
    for name, draw in DRAWN.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
