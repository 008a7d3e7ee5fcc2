"""Shows the page: one file, under a policy by which a browser runs nothing but that file's own script and style."""

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

FILE = Path(__file__).with_name("page.html")


async def show(request: Request) -> Response:
    """The page."""
    html, policy = _page()
    return HTMLResponse(html, headers={"content-security-policy": policy, "cache-control": "no-cache"})


@functools.cache
def _page() -> tuple[str, str]:
    html = FILE.read_text(encoding="utf-8")
    own = {tag: _digest(re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)) for tag in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {own['script']}; style-src {own['style']}; connect-src 'self'; img-src data:"
    )
    return html, f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _digest(texts: list[str]) -> str:
    assert len(texts) == 1
    return f"'sha256-{base64.b64encode(hashlib.sha256(texts[0].encode()).digest()).decode()}'"
