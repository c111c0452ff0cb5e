"""GET / (the demo page) and GET /docs (Swagger UI): files of static/, which need no key and ask nothing of other hosts."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

_STATIC = Path(__file__).parent / "static"
_SWAGGER_UI = ("swagger-ui/swagger-ui-bundle.js", "swagger-ui/swagger-ui.css")
_PARTS = ("demo.css", "demo.js", "camera.js", "docs.js", "example.jpg", *_SWAGGER_UI)
_FILES = {"/": "demo.html", "/docs": "docs.html"} | {f"/static/{name}": name for name in _PARTS}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".jpg": "image/jpeg",
}
# Swagger UI styles its elements one by one, and its icons are data: URLs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PATHS = frozenset(_FILES)

router = APIRouter(include_in_schema=False)


def _page_of(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content = file.read_bytes()
    headers = {
        "Content-Type": _TYPES[file.suffix],
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",  # ask each time, and take 304 for an answer
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    }

    async def page(request: Request) -> Response:
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")}
        if known & {headers["ETag"], "*"}:  # a proxy that compresses makes tags weak
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return page


for _path, _name in _FILES.items():
    router.add_api_route(_path, _page_of(_STATIC / _name))
