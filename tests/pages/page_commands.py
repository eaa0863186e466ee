"""The commands that the pages show, and for each that no test of the pages runs: what runs it, or why nothing can."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])
BLOCK = re.compile(r"^( *)```(console|bash|sh|shell)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
STARTS_SERVER = re.compile(r"(?:\w+=\S+ )*(?:headwater serve|\.venv/bin/headwater serve|make serve)\b")


@dataclass(frozen=True, slots=True)
class PageCommand:
    """One command of a console of a page, with continued lines joined and without its output."""

    page: str  # relative to the repository
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text[:70]}"


def commands_of(block: str, *, is_session: bool) -> Iterator[str]:
    """In a session, the lines that begin with a prompt; else all lines. The other lines of a session are output."""
    found = ""
    for line in block.splitlines():
        if found:
            found += "\n" + line
        elif line.startswith("$ ") or (not is_session and line.strip() and not line.startswith("#")):
            found = line.removeprefix("$ ")
        if found and not found.endswith("\\") and found.count("'") % 2 == 0:
            yield found
            found = ""


def console_blocks(page: Path) -> list[list[PageCommand]]:
    """The commands of each console of a page; a console that shows output only has none."""
    name, found = page.relative_to(ROOT).as_posix(), []
    for _, language, block in BLOCK.findall(page.read_text()):
        is_session = language == "console" or re.search(r"^ *\$ ", block, re.MULTILINE) is not None
        commands = commands_of(textwrap.dedent(block), is_session=is_session)
        found.append([PageCommand(name, text) for text in commands])
    return [block for block in found if block]


def why_elsewhere(command: PageCommand) -> str | None:
    """What runs this command if the tests of the pages do not, or why nothing can run it in CI; None: they run it."""
    for page, start, why in ELSEWHERE:
        if re.fullmatch(page, command.page) and re.match(start, command.text):
            return why
    return None


def is_dear(command: PageCommand) -> bool:
    """Whether it takes seconds of CPU, so that `make test-pages` runs it and `make test` does not."""
    return any(re.match(start, command.text) for start in DEAR)


_BLOCKS = "integrations/run.py runs the blocks of this page as they stand"
_PROGRAMS = "integrations/run.py starts these programs with these options, on ports of its own"
_PACKAGES = "integrations/run.py installs these packages, in versions that it pins"
_RAY = "needs Ray: `make test-fleet` runs it in tests/e2e/fleet/test_fleet_on_ray.py"
_DOCKER = "needs Docker"
_KUBERNETES = "needs Kubernetes"
_GPU = "needs a GPU"
_MINUTES = "takes minutes"
_INSTALLS = "installs a release from PyPI; `make test-wheel` installs the wheel of this source and serves from it"

# (page, beginning of the command, what runs it or why nothing does), as patterns
ELSEWHERE: list[tuple[str, str, str]] = [
    (r"docs/clients/[\w-]+\.md", r"(?:pip|npm) install", _PACKAGES),
    (r"docs/clients/(?:aiperf|evalscope|genai-bench|guidellm|lm-eval|sglang-bench)\.md", r"", _BLOCKS),
    (r"docs/clients/(?:dynamo|llm|sglang-router|smg)\.md", r"", _PROGRAMS),
    (r"docs/backends\.md", r"(?:headwater serve|python |export DYN)", _PROGRAMS),
    (r"docs/clients/index\.md", r"(?:HEADWATER_URL=\S+ )?python integrations/run", "tests/e2e/test_integrations.py"),
    (r"docs/fleet\.md", r"(?:headwater|curl|pip)", _RAY),
    (r"docs/cuda\.md", r"(?:headwater serve|python benchmarks/gpu)", _GPU),
    (r"docs/deterministic\.md", r"headwater serve", _GPU),
    (r"docs/deployment\.md", r"python3 -m venv /opt", _INSTALLS),
    (r"docs/deployment\.md", r"(?:cp deploy/headwater\.service|journalctl)", "changes systemd's services"),
    (r"docs/deployment\.md", r"docker ", _DOCKER),
    (r"docs/deployment\.md", r"kubectl ", _KUBERNETES),
    (r"docs/metrics\.md", r"docker ", _DOCKER),
    (r"docs/metrics\.md", r"python integrations/monitoring", "CI runs it: `make test-dashboard`"),
    (r"docs/logs\.md", r"pip install", _INSTALLS),
    (r"docs/first-hour\.md", r"EXTRAS=top make setup", "installs a package; CI runs `make setup`"),
    (r"docs/mutants\.md", r"python -m headwater\.simulation", f"{_MINUTES}; tests/simulation hunts each mutant"),
    (r"docs/reliability\.md", r"headwater simulate(?:$| +#| --seed)", f"{_MINUTES}; tests/cli/test_simulate_cli.py"),
    (r"docs/reliability\.md", r"headwater simulate --replay", "tests/cli/test_simulate_cli.py replays a file"),
    (r"docs/speculation\.md", r"headwater simulate", f"{_MINUTES}; tests/simulation plays shorter runs"),
    (r"docs/planning\.md", r"headwater simulate --plan --fleet-flush", f"{_MINUTES}; tests/cli/test_plan_cli.py"),
    (r"docs/rl\.md", r"python integrations/training/weights_oracle\.py", f"{_MINUTES}; needs transformers and a model"),
    (r"docs/trl\.md", r"(?:make training|python integrations/training)", "CI runs it: tests/e2e/training"),
    (r"docs/[\w-]+\.md", r"(?:\.venv/bin/)?python -m pytest", "`make test` runs the test"),
    (r"docs/(?!cuda)[\w-]+\.md", r"(?:\.venv/bin/)?python benchmarks/", f"a benchmark: {_MINUTES}, on a quiet machine"),
    (r"CONTRIBUTING\.md", r"make ", "CI runs the targets"),
]  # fmt: skip

DEAR = [
    r"(?:\.venv/bin/)?headwater bench",
    r"headwater simulate",
    r"\.venv/bin/headwater doctor --hicache",
]
