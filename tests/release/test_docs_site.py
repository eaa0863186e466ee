"""The site: reference pages from the code, links that lead somewhere, manifests and pictures that are true."""

import re
import runpy
import shlex
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
import yaml

from docs_reference import BORROWED, cli_reference, http_reference, openapi, with_links_of_the_site
from headwater.cli.main import COMMANDS, app
from headwater.launch.config import FLAGS

ROOT = Path(__file__).parents[2]


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, which names a Python function."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def test_every_page_is_in_the_navigation() -> None:
    """A page outside of it fails the build."""
    listed = set(re.findall(r"[\w/-]+\.md", str(yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"])))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").glob("**/*.md")}
    assert listed == pages | set(BORROWED) | {"reference/http.md", "reference/cli.md"}


def test_the_reference_has_every_command_and_flag() -> None:
    page = cli_reference()
    assert [name for name in COMMANDS if f"\n## headwater {name}\n" not in page] == []
    flags = {"--" + name.replace("_", "-") for name in FLAGS}
    assert len(flags) > 50
    serve = page.partition("\n## headwater serve\n")[2].partition("\n## ")[0]
    assert sorted(flag for flag in flags if not re.search(rf"{flag}\b", serve)) == []


def test_the_reference_has_every_route() -> None:
    document = openapi()
    page = http_reference(document)
    routes = [f"### `{method.upper()} {path}`" for path, methods in document["paths"].items() for method in methods]
    assert len(routes) > 60
    assert [route for route in routes if route not in page] == []


@pytest.mark.parametrize(
    ("page", "given", "made"),
    [
        ("flush.md", "[design](design.md#words)", "[design](design.md#words)"),
        ("index.md", "[../README.md](../README.md)", "[../README.md](quickstart.md)"),
        ("clients/llm.md", "[flush](../flush.md)", "[flush](../flush.md)"),
        ("flush.md", "[record](../benchmarks/results/x.json)", "record (`benchmarks/results/x.json`)"),
        ("flush.md", "[SGLang](https://github.com/x)", "[SGLang](https://github.com/x)"),
        ("contributing.md", "[metrics](docs/metrics.md#alarms)", "[metrics](metrics.md#alarms)"),
        ("benchmarks.md", "[records](../docs/measurements.md)", "[records](measurements.md)"),
        ("flush.md", "```\n[a](../b.py)\n```\n", "```\n[a](../b.py)\n```\n"),
        ("concepts.md", "![A tree](pictures/prefix.svg)", "![A tree](pictures/prefix.svg)"),
    ],
)
def test_links_lead_to_pages_of_the_site(page: str, given: str, made: str) -> None:
    assert with_links_of_the_site(given, page) == made


def test_the_pictures_are_what_their_script_draws() -> None:
    """A change of the script that is not run, or of a picture by hand."""
    pictures = ROOT / "docs" / "pictures"
    for name, draw in runpy.run_path(str(pictures / "draw_concepts.py"))["DRAWN"].items():
        assert (pictures / name).read_text(encoding="utf-8") == draw(), name
        light, dark = (ElementTree.fromstring(draw()).findtext("{*}style") or "").split("prefers-color-scheme: dark")
        for kind in re.findall(r"(\.[\w-]+|text) \{ (?:fill|stroke): #", light):
            assert f"{kind} {{" in dark or f"{kind}," in dark, f"{name}: {kind} has no colour in dark mode"


def started_with(arguments: list[str]) -> None:
    name, command, rest = app.resolve_command(app.make_context("headwater", ["version"]), arguments)
    assert command is not None
    command.make_context(name, rest)


def test_the_system_service_starts_a_server() -> None:
    unit = (ROOT / "deploy" / "headwater.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    words = shlex.split(line)
    assert words[0].endswith("/headwater")
    started_with(words[1:])
    with pytest.raises(click.UsageError):
        started_with([*words[1:], "--no-such-flag"])


def test_the_manifest_has_probes_on_routes_that_need_no_key() -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["PersistentVolumeClaim", "Deployment", "Service"]
    (container,) = documents[1]["spec"]["template"]["spec"]["containers"]
    started_with(["serve", "--host", "0.0.0.0", *container["args"]])
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in documents[1]["spec"]["template"]["spec"]["volumes"]}
    assert documents[2]["spec"]["selector"].items() <= documents[1]["spec"]["template"]["metadata"]["labels"].items()
