"""What a client's run found: kept as integrations/results/NAME.json, and shown as a table of clients and checks."""

import json
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from environment import cache_folder

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
COMMON_CHECKS = ("chat", "stream", "tools auto", "tools required", "tools named", "json_schema", "logprobs", "errors")
TABLE_BEGINS, TABLE_ENDS = "<!-- by integrations/run.py --table -->", "<!-- end of the table -->"
MARKS = {"passed": "yes", "failed": "**no**", "skipped": "-"}


def record_of(name: str, *, versions: Mapping[str, str], checks: list[dict[str, Any]]) -> dict[str, Any]:
    for check in checks:
        check["reason"] = without_paths(check["reason"])
    return {
        "client": name,
        "versions": dict(versions),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "passed": sum(check["result"] == "passed" for check in checks),
        "failed": sum(check["result"] == "failed" for check in checks),
        "skipped": sum(check["result"] == "skipped" for check in checks),
        "checks": checks,
    }


def without_paths(text: str) -> str:
    return text.replace(str(cache_folder()), "CACHE").replace(str(ROOT), ".").replace(str(Path.home()), "~")


def commit() -> str:
    """The commit that changed the server's code last; with a plus if the working tree differs from it."""
    last = ("git", "log", "-1", "--format=%h", "--abbrev=10", "--", "src")
    found = subprocess.run(last, cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "src"], cwd=ROOT, capture_output=True)
    return found.stdout.strip() + ("+" if changed.returncode else "")


def save(record: Mapping[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record['client']}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path


def saved() -> list[dict[str, Any]]:
    """All kept results of clients, by name."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [record for record in records if "client" in record]


def update_page(page: Path) -> None:
    """Write the table of the kept results into a page, in place of the one it has."""
    text = page.read_text()
    before, after = text.split(TABLE_BEGINS)[0], text.split(TABLE_ENDS)[1]
    page.write_text(f"{before}{TABLE_BEGINS}\n\n{table(saved())}\n\n{TABLE_ENDS}{after}")


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """A row for each client: the checks that most clients share, then the count of its own."""
    lines = [
        f"| client | version | {' | '.join(COMMON_CHECKS)} | its own |",
        "|---" * (len(COMMON_CHECKS) + 3) + "|",
    ]
    for record in records:
        results = {check["check"]: check["result"] for check in record["checks"]}
        common = [MARKS.get(results.pop(name, ""), "") for name in COMMON_CHECKS]
        own = f"{sum(result == 'passed' for result in results.values())} of {len(results)}" if results else ""
        version = next(iter(record["versions"].values()), "")
        lines.append(f"| {record['client']} | {version} | {' | '.join(common)} | {own} |")
    return "\n".join(lines)
