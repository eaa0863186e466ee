"""The pages read easily: lines that fit a screen, short sentences, plain words. CONTRIBUTING.md has the rules."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_COLUMNS = 120
MAX_WORDS = 40  # of a sentence
MAX_MEAN_WORDS = 20  # of a page's sentences
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"])
# Report, show, say; the client, the caller, the request; invalidate; release, drop; also.
BANNED = re.compile(
    r"\b(tells?|telling|told|(some|any|no)body|who(m)?ever|spoil\w*|lets? go|letting go|such as are)\b"
    r"|, too(?=[.;:,)]|$)",
    re.IGNORECASE,
)
NOUN_CLAUSE = re.compile(r"^(What|Whether|Who|Whatever)\b")  # as a subject; a question ends in `?`
LIST_ITEM = re.compile(r"\s*([-*]|\d+\.)\s+")
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|etc|vs)\.")
SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]]*\s+(?=["'(\[]*[A-Z0-9])""")


def plain(text: str) -> str:
    """Text without markup; a span of code counts as one word."""
    text = re.sub(r"``.+?``|`[^`]+`", "CODE", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]+>|\*\*|__|https?://\S+", "", text)
    return ABBREVIATIONS.sub(r"\1", text)


def sentences(text: str) -> list[str]:
    return [part for part in SENTENCE_END.split(plain(text).strip()) if part]


def num_words(sentence: str) -> int:
    return len(re.findall(r"[\w%][\w'’.,/+%-]*", sentence))


def without_code_blocks(text: str) -> list[str]:
    """The lines of a page; those of fenced blocks are empty, so that numbers of lines stay."""
    lines, fence = [], ""
    for line in text.splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
            lines.append("")
        else:
            lines.append("" if fence else line)
    return lines


def paragraphs(text: str) -> tuple[list[str], list[str]]:
    """Paragraphs and list items of a page, and the cells of its tables; headings and HTML are in neither."""
    blocks: list[str] = [""]
    cells: list[str] = []
    for line in without_code_blocks(text):
        stripped = line.strip()
        if stripped.startswith("|"):
            cells += [cell.strip() for cell in re.split(r"(?<!\\)\|", stripped) if cell.strip(" -:")]
        if not stripped or stripped.startswith(("|", "#", "<")):
            blocks.append("")
        elif item := LIST_ITEM.match(line):
            blocks.append(line[item.end() :])
        else:
            blocks[-1] += " " + stripped
    return [block for block in blocks if block.strip()], cells


def faults(text: str) -> list[str]:
    """What is hard to read, a line for each; empty for a good page."""
    blocks, cells = paragraphs(text)
    prose = [sentence for block in blocks for sentence in sentences(block)]
    of_cells = [sentence for cell in cells for sentence in sentences(cell)]
    found = [
        f"line {number} has {len(line)} columns"
        for number, line in enumerate(without_code_blocks(text), start=1)
        if len(line) > MAX_COLUMNS and not line.startswith("|") and "](" not in line and "http" not in line
    ]
    found += [f"{num_words(it)} words: {it}" for it in prose if num_words(it) > MAX_WORDS]
    found += [f"{num_words(it)} words: {it}" for it in of_cells if num_words(it.replace("CODE", "")) > MAX_WORDS]
    found += [f"a clause as the subject: {it}" for it in prose if NOUN_CLAUSE.search(it) and not it.endswith("?")]
    found += [f"`{bad[0]}`: {it}" for it in prose + of_cells for bad in BANNED.finditer(it)]
    mean = sum(map(num_words, prose)) / max(1, len(prose))
    if mean > MAX_MEAN_WORDS:
        found.append(f"{mean:.1f} words a sentence")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_reads_easily(page: Path) -> None:
    found = faults(page.read_text())
    assert not found, f"{page.relative_to(ROOT)}:\n" + "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_begins_with_two_sentences_about_itself(page: Path) -> None:
    title, first = [part.strip() for part in page.read_text().split("\n\n")[:2]]
    assert title.startswith("# ")
    assert "\n" not in title
    assert not first.startswith(("|", "#", "```", "- "))
    assert len(sentences(" ".join(first.split()))) >= 2


def test_each_fault_is_found() -> None:
    """And none of them in code; of the widths and means, none in tables."""
    long = "very " * 24 + "long."
    assert faults("It is\n" + "very\n" * 39 + "long.") == [
        "42 words: It is " + "very " * 39 + "long.",
        "42.0 words a sentence",
    ]
    assert faults("# Title\n\n" + long) == ["line 3 has 125 columns", "25.0 words a sentence"]
    assert faults("```\n" + long + "\n```\n| " + long + " |\n\nIt is short.") == []
    assert faults("| " + "very " * 41 + " | `" + "`, `".join("a" * 50) + "` |")[0].startswith("41 words")
    assert faults("The server told it. It is one, too.") == ["`told`: The server told it.", "`, too`: It is one, too."]
    assert faults("What it frees is small.") == ["a clause as the subject: What it frees is small."]
    assert faults("What does it free? See `nobody`.\n\n- `told`\n\n```\nsomebody\n```\n") == []
    assert faults("| somebody |") == ["`somebody`: somebody"]


def test_words_are_counted_by_sentence() -> None:
    text = "It frees 1.5 GB (e.g. `a b c`). See [the page](x.md). 20 are left"
    assert [num_words(sentence) for sentence in sentences(text)] == [6, 3, 3]
    blocks, cells = paragraphs("# A\n\nOne\ntwo.\n- three\n  four\n\n1. five\n\n| a | b |\n|---|---|\n| c `|` d | |\n")
    assert [" ".join(block.split()) for block in blocks] == ["One two.", "three four", "five"]
    assert cells[:2] == ["a", "b"]
