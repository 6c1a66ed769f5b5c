"""The web page's files as a real http worker serves them, and what they must not hold."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from http_rig import running

from minisgl.http import page
from minisgl.timeline import HOPS

WEB = Path(str(files("minisgl.http"))) / "web"
NAMES_OF_NAMESPACES = {"http://www.w3.org/2000/svg"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running() as rig, httpx.Client(base_url=f"http://127.0.0.1:{rig.port}") as client:
        yield client


def test_every_file_is_served_with_headers_that_keep_it_to_itself(client: httpx.Client) -> None:
    types = {".js": "text/javascript", ".css": "text/css", "": "text/html"}
    for path in page.PATHS:
        response = client.get(path)
        assert response.status_code == 200, path
        assert response.headers["content-type"] == f"{types[Path(path).suffix]}; charset=utf-8"
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert "unsafe" not in response.headers["content-security-policy"]


def test_all_of_it_is_small_and_all_files_are_served(client: httpx.Client) -> None:
    served = [client.get(path).content for path in page.PATHS]
    assert sum(map(len, served)) < 100_000
    assert sorted(served) == sorted(file.read_bytes() for file in WEB.iterdir())


@pytest.mark.parametrize("path", ["/web", "/web/", "/web/index.html", "/web/../app.py", "/web/page.js/"])
def test_nothing_else_is_served(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


def test_no_foreign_host_and_no_code_in_the_markup(client: httpx.Client) -> None:
    for html in (client.get("/").text, client.get("/docs").text):
        assert re.findall(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|javascript:", html) == []
        for target in re.findall(r'(?:src|href|action)="([^"]*)"', html):
            assert target in (*page.PATHS, "/openapi.json") or target.startswith("data:image/svg+xml,")
    for path in page.PATHS:
        text = client.get(path).text
        assert set(re.findall(r"https?://[\w.]+[\w./-]*", text)) <= NAMES_OF_NAMESPACES, path
        assert re.findall(r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|eval|document\.write|@import)\b", text) == [], (
            path
        )


def test_every_module_that_is_imported_is_served(client: httpx.Client) -> None:
    for path in page.PATHS:
        for name in re.findall(r'from "\./([^"]+)"', client.get(path).text):
            assert f"/web/{name}" in page.PATHS


def test_the_elements_that_the_scripts_look_up_exist(client: httpx.Client) -> None:
    def wanted(path: str) -> set[str]:
        return set(re.findall(r'(?:byId|getElementById)\("([^"]+)"\)', client.get(path).text))

    scripts = {path for path in page.PATHS if path.endswith(".js")}
    shared = {"/web/key.js", "/web/api.js"}
    for html, others in (("/", {"/web/docs.js"}), ("/docs", scripts - shared - {"/web/docs.js"})):
        ids = re.findall(r'\sid="([^"]+)"', client.get(html).text)
        assert len(ids) == len(set(ids))
        assert set().union(*map(wanted, scripts - others)) <= set(ids)


def test_the_timeline_knows_every_hop() -> None:
    table = (WEB / "timeline.js").read_text().partition("const HOPS = [")[2].partition("\n];")[0]
    assert tuple(re.findall(r'\["(\w+)"', table)) == HOPS


# ---- Markdown, in node ----------------------------------------------------------------------------------------------


def node(script: str, *options: str) -> str:
    program = shutil.which("node")
    if program is None:
        pytest.skip("needs node, which is not installed here")
    command = [program, "--input-type=module", *options, "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts_are_valid_javascript() -> None:
    for file in WEB.glob("*.js"):
        node(file.read_text(), "--check")


MARKDOWN = {
    "plain": "<p>plain",
    "a\nb\n\nc": "<p>a<br>b<p>c",
    "**bold** *it* __b__ _i_ `a*b*`": "<p><strong>bold <em>it <strong>b <em>i <code>a*b*",
    "snake_case_name 2*3*4 * x": "<p>snake_case_name 2<em>34 * x",
    "# One\n### Three #": "<h1>One<h3>Three",
    "- a\n- b\n  - c\n\nend": "<ul><li>a<li>b<ul><li>c<p>end",
    "3. a\n4. b": "<ol start=3><li>a<li>b",
    "```python\nx = '<b>'\n\n# y\n```\nafter": "<pre data-language=python><code>x = '<b>'\n\n# y<p>after",
    "```\nnot closed": "<pre><code>not closed",
    "> quoted\n> more": "<blockquote><p>quoted<br>more",
    "a\n***\nb": "<p>a<hr><p>b",
    "[x](https://a.example/b_(c))": "<p><a href=https://a.example/b_(c)>x",
    "see https://a.example/x.": "<p>see <a href=https://a.example/x>https://a.example/x.",
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))",
    "[x](data:text/html,hi) [y](/docs)": "<p>[x](data:text/html,hi) [y](/docs)",
    "<img src=x onerror=alert(1)>": "<p><img src=x onerror=alert(1)>",
    "\\*no\\*": "<p>*no*",
}


def test_markdown_becomes_the_tree_that_is_meant() -> None:
    """Trees are written with the tags opened only, and without the attributes that every link or block of code has."""
    script = f"""
        import {{ parse }} from {json.dumps((WEB / "markdown.js").as_uri())};
        const told = ([name]) => !["rel", "target", "tabindex"].includes(name);
        const attributes = (node) => Object.entries(node.attributes).filter(told)
            .map(([name, value]) => ` ${{name}}=${{value}}`);
        const shown = (node) => typeof node === "string" ? node
            : `<${{node.tag}}${{attributes(node).join("")}}>${{node.children.map(shown).join("")}}`;
        console.log(JSON.stringify({json.dumps(list(MARKDOWN))}.map((text) => parse(text).map(shown).join(""))));
    """
    for text, tree in zip(MARKDOWN, json.loads(node(script)), strict=True):
        assert tree == MARKDOWN[text], text


def test_hostile_markdown_is_parsed_in_time_and_brings_no_tags() -> None:
    script = f"""
        import {{ parse }} from {json.dumps((WEB / "markdown.js").as_uri())};
        const tags = new Set();
        const walk = (node) => typeof node === "string" || (tags.add(node.tag), node.children.forEach(walk));
        const parts = ["*", "**", "_", "`", "```\\n", "[", "[x](", ">", "> ", "- ", "  ", "\\n", "1. ", "#", "<a>"];
        for (const part of [...parts, "https://x"])
            for (const other of ["", "a", " b ", "\\n"]) parse((part + other).repeat(4000)).forEach(walk);
        console.log([...tags].sort().join(" "));
    """
    tags = set(node(script).split())
    allowed = "a blockquote br code em h1 h2 h3 h4 h5 h6 hr li ol p pre strong ul"
    assert tags <= set(allowed.split())
