"""Pages for people: the front page and the documentation. They load nothing from other servers."""

from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from headwater.generation.errors import ApiError
from headwater.http_api.json_body import JsonRoute
from headwater.http_api.services import InjectedServices
from headwater.version import version

# FastAPI's page takes these from a CDN
SWAGGER_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon.png": "image/png"}
# loads nothing from other servers, and no other site may frame the page and capture clicks on it
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
}
LINKS = {
    "docs": "/docs",
    "openapi": "/openapi.json",
    "health": "/health",
    "metrics": "/metrics",
    "models": "/v1/models",
}

router = APIRouter(route_class=JsonRoute, tags=["information"])


@router.get("/", summary="What this is")
async def front_page(request: Request, services: InjectedServices) -> Response:
    """A short page for browsers, the same facts as JSON for programs. It also answers while the model loads."""
    model, is_serving = services.state.model, services.state.is_serving
    name = model.served_name if model else None
    if "text/html" not in request.headers.get("accept", ""):
        facts: dict[str, Any] = {
            "name": "Headwater",
            "version": version(),
            "model": name,
            "status": "ready" if is_serving else "not ready",
        }
        return JSONResponse(facts | LINKS)
    status = f"It serves <code>{escape(name)}</code>." if name and is_serving else "It is not ready to serve yet."
    page = Template(files("headwater.http_api").joinpath("front_page.html").read_text(encoding="utf-8"))
    url = escape(str(request.base_url).rstrip("/"))
    text = page.substitute(version=version(), status=status, url=url)
    return HTMLResponse(text, headers=PAGE_HEADERS)


@router.get("/docs", include_in_schema=False)
async def documentation() -> Response:
    """Swagger UI. Its addresses are relative, so a proxy may serve it below a path."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Headwater",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon.png",
        swagger_ui_parameters={"validatorUrl": None},  # would send the schema to another server
    )
    page.headers.update(PAGE_HEADERS)
    return page


@router.get("/docs/{name}", include_in_schema=False)
async def documentation_file(name: str) -> Response:
    if name not in SWAGGER_FILES:
        raise ApiError(404, "there is no such page; see /docs", code="not_found")
    path = str(files("fastapi_offline").joinpath("static", name))
    return FileResponse(path, media_type=SWAGGER_FILES[name], headers={"Cache-Control": "max-age=86400"})
