"""The files of the page at ``/``, read without a browser."""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import httpx2
import pytest

from multimodal.serve.endpoints.asking import ChatRequest
from multimodal.serve.endpoints.drawings import ImageRequest
from multimodal.serve.static import FOLDER, KINDS

FILES = {path.name: path.read_text("utf-8") for path in sorted(FOLDER.iterdir())}
HTML, CSS = FILES["index.html"], FILES["page.css"]
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
IDS = re.findall(r'\bid="([^"]+)"', HTML)


def test_the_page_is_served_without_a_key_and_the_api_is_not(server: Any) -> None:
    with httpx2.Client(base_url=f"http://127.0.0.1:{server.port}") as client:
        assert client.get("/v1/models").status_code == 401
        for name, text in FILES.items():
            answer = client.get("/" if name == "index.html" else f"/page/{name}")
            assert answer.status_code == 200 and answer.text == text
            kind = KINDS[name[name.rindex(".") :]]
            assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
            assert answer.headers["x-content-type-options"] == "nosniff"
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy and "*" not in policy and ":/" not in policy
        for path in ("/page/", "/page/none.js", "/page/..%2fapp.py", "/page/../app.py"):
            assert client.get(path).status_code in (401, 404)


def test_pages_of_other_sites_cannot_use_a_server_without_a_key(
    tiny_model: Callable[..., Any], serving: Any, server: Any
) -> None:
    """By a name of theirs that leads here, by what a form may send, or by a form."""
    kind = {"Content-Type": "application/json"}
    body = json.dumps({"model": "tiny", "input": "a dog"}).encode()
    with serving(tiny_model(), keys=()) as open_server:
        with httpx2.Client(base_url=f"http://127.0.0.1:{open_server.port}") as client:

            def post(**headers: str) -> tuple[int, str | None]:
                answer = client.post("/v1/embeddings", content=body, headers=headers)
                return answer.status_code, answer.json().get("error", {}).get("code")

            for host in ("localhost:8000", "LOCALHOST", "127.0.0.1", "[::1]:80"):
                assert post(**kind, Host=host) == (200, None)
            for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "::1"):
                assert post(**kind, Host=host) == (403, "wrong_host")
                assert client.get("/", headers={"Host": host}).status_code == 403
                assert client.get("/metrics", headers={"Host": host}).status_code == 403
                assert client.get("/health", headers={"Host": host}).status_code == 200
            assert client.get("/metrics").status_code == 200
            for one in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/jsonx"}):
                assert post(**one) == (415, "unsupported_media_type")
            assert post(**{"Content-Type": "Application/JSON; charset=utf-8"}) == (200, None)
            assert post(**kind, **{"Sec-Fetch-Site": "cross-site"}) == (403, "cross_site")
            assert post(**kind, **{"Sec-Fetch-Site": "same-origin"}) == (200, None)
    # With a key they can do nothing: a name of the operator's is right, too.
    headers = {"Authorization": "Bearer sk-test", "Host": "models.example"}
    url = f"http://127.0.0.1:{server.port}/v1/embeddings"
    assert httpx2.post(url, content=body, headers=headers).status_code == 200


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    assert all(" src=" in tag for tag in re.findall(r"<script[^>]*>", HTML))
    assert not re.search(r"<style|\sstyle=|\son\w+=", HTML)
    for name, text in FILES.items():
        assert not re.search(r"(https?:)?//[\w-]+\.\w", text.replace("$//", "")), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|Function\(", text)
        assert text.count("\n") < 400 and max(map(len, text.splitlines())) <= 100, name


def test_names_fit_together() -> None:
    assert len(IDS) == len(set(IDS))
    names = "for|aria-controls|aria-labelledby|aria-describedby"
    pointers = re.findall(rf'\s(?:{names})="([^"]+)"', HTML)
    used = [name for text in SCRIPTS.values() for name in re.findall(r'\$\("([^"]+)"\)', text)]
    assert len(used) > 30
    assert {*used, *pointers} <= set(IDS)
    imported = {name for text in SCRIPTS.values() for name in re.findall(r'"\./(\w+\.js)"', text)}
    assert imported | {"page.js"} == set(SCRIPTS), "a file is missing, or nobody imports it"
    for text in SCRIPTS.values():
        for names, name in re.findall(r'import \{([^}]+)\} from "\./(\w+\.js)"', text):
            for one in names.split(","):
                exported = (
                    rf"export (async )?(function\*?|const|class) {re.escape(one.strip())}(?!\w)"
                )
                assert re.search(exported, SCRIPTS[name]), f"{name} has no {one}"


def test_the_settings_are_options_of_the_server() -> None:
    known = {item.name for kind in (ChatRequest, ImageRequest) for item in fields(kind)}
    settings = re.findall(r'<(?:input|select) id="(\w+)"', HTML[HTML.index('id="options"') :])
    settings = settings[: settings.index("negative_prompt") + 1]
    assert len(settings) == 7 and set(settings) <= known


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance; colour: #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_edges_can_be_seen(scheme: str) -> None:
    """4.5 for texts, 3 for edges of controls (WCAG 2.2, AA)."""
    light, dark = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", light if scheme == "light" else dark))
    pairs = {("edge", "paper"): 3.0, ("edge", "field"): 2.9, ("on-accent", "accent"): 4.5}
    for text in ("ink", "soft", "accent", "bad"):
        pairs |= {(text, "paper"): 4.5, (text, "field"): 4.5}
    for (one, other), least in pairs.items():
        low, high = sorted(luminance(colours[name]) for name in (one, other))
        assert (high + 0.05) / (low + 0.05) >= least, f"{one} on {other}"
