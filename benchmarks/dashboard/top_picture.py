"""Takes the picture of `headwater top` for the documentation, of a running server: `top_picture.py URL`.

The picture in the documentation shows the default model under this load, with a flush that waits:

    headwater serve --enable-hierarchical-cache --max-total-tokens 8000 --hicache-ratio 2
    headwater bench --requests 200 --concurrency 8 --prefixes 6 --prefix-tokens 200 --user-tokens 40 --flush none
    headwater flush --timeout 60
"""

import argparse
import asyncio
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from headwater.cli.server_call import Server
from headwater.cli.top.app import TopApp

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "top.svg"
FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # loads a font from elsewhere; every system has another one


async def take(url: str, seconds: float) -> str:
    """The screen as SVG, after it has watched for a while."""
    app = TopApp(Server(url))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause(seconds)
        return FONT_FACE.sub("", app.export_screenshot(title="headwater top"))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=10.0, help="time to watch before the picture")
    options = parser.parse_args(argv)
    PICTURE.write_text(asyncio.run(take(options.url, options.seconds)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
