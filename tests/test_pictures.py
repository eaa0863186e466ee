"""The pictures of the documentation are what their scripts draw."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

MAX_BYTES = 200_000
PICTURES = Path(__file__).parents[1] / "docs/pictures"


def test_the_picture_of_the_tiers_is_what_its_script_draws() -> None:
    """A change of the script that is not run, or of the picture by hand."""
    drawn = runpy.run_path(str(PICTURES / "draw_tiers.py"))["draw"]()
    assert (PICTURES / "tiers.svg").read_text(encoding="utf-8") == drawn


def test_the_picture_of_the_tiers_can_be_read_in_light_and_dark() -> None:
    """A colour that dark mode forgets: every class that light mode colours for words has one there."""
    root = ElementTree.fromstring((PICTURES / "tiers.svg").read_text(encoding="utf-8"))
    light, dark = (root.findtext("{*}style") or "").split("prefers-color-scheme: dark")
    for shown in (".card {", "text {", ".soft {", *(f".t-{name} {{" for name in ("tree", "private", "retired", "cut"))):
        assert shown in light, shown
        assert shown in dark, shown


def test_the_pictures_of_the_operating_page_stay_small() -> None:
    """A clone fetches every version of them; `benchmarks/dashboard/pictures.py` reduces their colours."""
    sizes = {path.name: path.stat().st_size for path in PICTURES.glob("dashboard-*.png")}
    assert sorted(sizes) == ["dashboard-dark.png", "dashboard-light.png", "dashboard-phone.png"]
    assert max(sizes.values()) < MAX_BYTES, sizes


def test_the_picture_of_the_terminal_loads_nothing_and_stays_small() -> None:
    """Its library would load a font from a server of others; `benchmarks/dashboard/top_picture.py` removes that."""
    text = (PICTURES / "top.svg").read_text(encoding="utf-8")
    assert "url(http" not in text
    assert len(text) < MAX_BYTES
    shown = "".join(ElementTree.fromstring(text).itertext()).replace("\N{NO-BREAK SPACE}", " ")
    for words in ("device", "hit rate", "TTFT", "ITL", "running", "pending", "Flush"):
        assert words in shown, words
