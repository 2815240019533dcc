"""The page at ``/``: plain files in the folder ``page``, which need no build step.

A strict Content-Security-Policy: scripts, styles and requests of this server only, nothing inline,
and no other page may frame it. The files hold no secret, so they are served without a key.
"""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new release of the server shows its own page
}


def page_routes() -> list[Route]:
    """One address a file: ``/`` and ``/page/NAME``."""
    return [_route(path) for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS]


def _route(path: Path) -> Route:
    content, kind = path.read_bytes(), KINDS[path.suffix]

    async def send(request: Request) -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    return Route("/" if path.name == "index.html" else f"/page/{path.name}", send, methods=["GET"])
