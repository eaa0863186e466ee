"""Hooks of mkdocs.yml, which `make docs` runs: `docs_reference` does the work."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs_reference import BORROWED, ROOT, cli_reference, http_reference, openapi, with_links_of_the_site


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made and those that are borrowed."""
    made = {"reference/cli.md": cli_reference(), "reference/http.md": http_reference(openapi())}
    made |= {page: (ROOT / path).read_text() for page, path in BORROWED.items()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site."""
    return with_links_of_the_site(markdown, page.file.src_uri)
