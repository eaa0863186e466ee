"""What the documentation's site has besides docs/: reference pages made from the code, and links that work there.

The pages in docs/ are written for GitHub. There a link may lead to any file of the repository; the site has the pages,
CONTRIBUTING.md and CHANGELOG.md, so another link becomes the file's name.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import click

from headwater.cli.main import COMMANDS
from headwater.client.engine_client import EngineClient
from headwater.http_api.app import create_app
from headwater.http_api.state import ApiState

ROOT = Path(__file__).resolve().parents[1]
# pages of the site that lie elsewhere in the repository
BORROWED = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
}
ELSEWHERE = {"README.md": "quickstart.md"} | {path: page for page, path in BORROWED.items()}
WIDTH = 100
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^(```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)


def with_links_of_the_site(markdown: str, page: str) -> str:
    """`markdown` of the site's `page`, with every link of the repository turned into one of the site, or into text."""
    here = PurePosixPath(BORROWED.get(page, f"docs/{page}"))

    def mend(link: re.Match[str]) -> str:
        mark, text, target = link[1], link[2], link[3]
        path, _, anchor = target.partition("#")
        if not path or re.match(r"\w+:", target) or page.startswith("reference/"):
            return link[0]
        wanted = os.path.normpath(here.parent / path)
        on_site = wanted.removeprefix("docs/") if wanted.startswith("docs/") else ELSEWHERE.get(wanted)
        if on_site is None:
            return f"{text} (`{wanted}`)" if text.strip("`") != wanted else f"`{wanted}`"
        relative = os.path.relpath(on_site, os.path.dirname(page) or ".")
        return f"{mark}[{text}]({relative}{'#' + anchor if anchor and on_site != 'quickstart.md' else ''})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(mend, part) for part in parts)


# --- the command line -------------------------------------------------------------------------------


def cli_reference() -> str:
    """The help of every command."""
    lines = ["# Command line", "", "This page is made from the code: it is what `--help` of each command prints.", ""]
    for name, entry in COMMANDS.items():
        for words, command in commands(f"headwater {name}", entry.load()):
            context = click.Context(command, info_name=words, terminal_width=WIDTH, max_content_width=WIDTH)
            lines += [f"## {words}", "", "```text", command.get_help(context).rstrip(), "```", ""]
    return "\n".join(lines)


def commands(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """A command and those below it."""
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=words)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None:
                yield from commands(f"{words} {name}", below)


# --- the HTTP API -----------------------------------------------------------------------------------


def openapi() -> dict[str, Any]:
    """The document that a server has at /openapi.json."""
    return create_app(ApiState(client=EngineClient(["inproc://nowhere"]), server_args={})).openapi()


def http_reference(document: dict[str, Any]) -> str:
    """Every route by its tag, with parameters, body and answers."""
    routes: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            text = _route(f"{method.upper()} {path}", operation, document)
            routes.setdefault((operation.get("tags") or ["other"])[0], []).append(text)
    text = "This page is made from the code: a server has the same as `/openapi.json` and, to try, as `/docs`."
    return f"# HTTP API\n\n{text}\n" + "".join(f"\n## {tag}\n\n" + "\n".join(texts) for tag, texts in routes.items())


def _route(title: str, operation: dict[str, Any], document: dict[str, Any]) -> str:
    lines = [f"### `{title}`", "", operation.get("summary", ""), ""]
    if operation.get("description"):
        lines += [operation["description"].strip(), ""]
    given = operation.get("parameters", ())
    rows = [(it["name"], it["in"], it.get("schema", {}), it.get("description", "")) for it in given]
    content = operation.get("requestBody", {}).get("content", {})
    body = _resolved(next(iter(content.values()), {}).get("schema", {}), document)
    fields = body.get("properties", {}).items()
    rows += [(name, "body", schema, schema.get("description", "")) for name, schema in fields]
    if rows:
        lines += ["| parameter | in | type | |", "|---|---|---|---|"]
        lines += [f"| `{name}` | {place} | {_cell(_kind(kind))} | {_cell(text)} |" for name, place, kind, text in rows]
        lines.append("")
    lines += ["| answer | |", "|---|---|"]
    answers = operation["responses"].items()
    lines += [f"| {status} | {_cell(answer.get('description', ''))} |" for status, answer in answers]
    return "\n".join([*lines, ""])


def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """What a reference stands for; of alternatives the first one."""
    while "$ref" in schema or "anyOf" in schema or "allOf" in schema:
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        else:
            schema = (schema.get("anyOf") or schema["allOf"])[0]
    return schema


def _kind(schema: dict[str, Any]) -> str:
    """The type of a value in a word or two."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    alternatives = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if alternatives:
        return " or ".join(dict.fromkeys(_kind(each) for each in alternatives))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
