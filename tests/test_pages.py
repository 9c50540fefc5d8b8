"""The pages as a reader's viewer has them: equations reach it unchanged, sentences are short."""

import re

import pytest
from conftest import ROOT

MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md"]


def tokens(text):
    """All tokens of a CommonMark parser, with GitHub's tables."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_parser_changes_no_equation(page):
    """Display: fenced blocks called math. Inline: $`...`$, code between dollars."""
    text, found = page.read_text(encoding="utf-8"), [*tokens(page.read_text(encoding="utf-8"))]
    display = [token.content for token in found if token.type == "fence" and token.info == "math"]
    assert display == re.findall(r"^```math\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    code = [token.content for token in found if token.type == "code_inline"]
    for formula in re.findall(r"\$`([^`]+)`\$", text):
        assert formula in code
    prose = "".join(token.content for token in found if token.type == "text")
    assert prose.count("$") == 2 * len(re.findall(r"\$`[^`]+`\$", text))  # and none is left bare


def sentences(page):
    """Of the page's prose, without tables: code and formulas count as one word."""
    found, in_table = [], False
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        in_table = token.type == "table_open" or in_table and token.type != "table_close"
        if token.type == "inline" and not in_table:
            text = "".join({"text": part.content, "softbreak": " ", "code_inline": "Code"}.get(
                part.type, "") for part in token.children)
            found += re.split(r"(?<=[.!?])\s+(?=[^a-z ])", text)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_sentence_has_at_most_30_words_and_a_page_170_lines(page):
    assert not [one for one in sentences(page) if len(one.split()) > 30]
    assert len(page.read_text(encoding="utf-8").splitlines()) <= (
        220 if page.name == "README.md" else 170)
