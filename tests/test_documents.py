"""README and docs: every block runs, every link leads somewhere, generated pages are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import documents
import pytest
from documents import ROOT, Block

BLOCKS = documents.blocks()
# Once each, however many documents have it.
HERE = list({b.text: b for b in BLOCKS if not b.needs}.values())
SERVERS = [b for b in HERE if b.starts_server]
CLIENTS = [b for b in HERE if b.asks_server]
OTHERS = [b for b in HERE if b not in SERVERS + CLIENTS]


def test_what_blocks_need_is_known() -> None:
    assert len(BLOCKS) > 20
    for block in BLOCKS:
        assert block.needs <= documents.NEEDS, block.name
        for path in re.findall(r"\b(?:deploy|tests|docs)/[\w./-]+\w", block.text):
            assert (ROOT / path).exists(), f"{block.name}: {path}"


@pytest.mark.parametrize("block", SERVERS, ids=lambda block: block.name)
def test_servers(block: Block, model: Path, tmp_path: Path) -> None:
    """They answer the clients of all documents."""
    with documents.Written(block, model):
        for client in CLIENTS:
            assert documents.run(client, model, tmp_path).strip()


@pytest.mark.parametrize("block", OTHERS, ids=lambda block: block.name)
def test_block_runs(block: Block, model: Path, tmp_path: Path) -> None:
    documents.run(block, model, tmp_path)


def test_generated_pages_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "generate.py", tmp_path], check=True)
    for page in ("FEATURES.md", "CONFIGURATION.md"):
        assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text(), (
            f"docs/{page}: run python docs/generate.py"
        )


class Links(HTMLParser):
    """Where a page leads to, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {values["id"]} if values.get("id") else set()
        self.targets += [v for k in ("href", "src") if (v := values.get(k))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", folder / "trees"]
    done = subprocess.run([*build, ROOT / "docs", folder / "html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_no_link_of_the_site_is_broken(site: Path) -> None:
    pages = {page: Links(page) for page in site.glob("*.html")}
    checked = 0
    for page, links in pages.items():
        for target in links.targets:
            if re.match(r"[a-z]+:", target) or page.name in ("search.html", "genindex.html"):
                continue
            path, _, anchor = target.partition("#")
            found = (page.parent / path.split("?")[0]).resolve() if path else page
            assert found.exists(), f"{page.name}: {target}"
            if anchor and found.suffix == ".html":
                assert anchor in pages[found].anchors, f"{page.name}: {target}"
            checked += 1
    assert checked > 100


def test_messages_in_troubleshooting_are_real() -> None:
    """Those of this package stand in its sources, word by word."""
    text = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text().split("## Of vLLM")[0]
    messages = re.findall(r"^`(.*?)`\n:", text, re.M)
    sources = [*(ROOT / "sparsek_vllm").rglob("*.py"), ROOT / "csrc" / "ops.cu"]
    code = "\n".join(path.read_text() for path in sources)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # literals over several lines
    for value, name in (
        ("{BACKEND_NAME}", "SPARSEK_XFORMERS"),
        ("{name} must be 1", "BSK_DEBUG must be 1"),
        ("{port}", "8000"),
    ):
        code = code.replace(value, name)
    assert len(messages) >= 8
    for message in messages:
        assert message in code, message


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=lambda path: path.name)
def test_rows_of_tables_are_as_long_as_their_heads(document: Path) -> None:
    columns = 0  # outside of a table
    for number, line in enumerate(document.read_text().splitlines(), 1):
        found = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert columns in (0, found) or not found, f"line {number}: {line}"
        columns = found


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
