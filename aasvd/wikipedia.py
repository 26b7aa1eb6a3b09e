"""The running text of Wikipedia articles, from the markup in a MediaWiki dump."""

import bz2
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

# mwparserfromhell is imported where it is used: it takes a while, and most runs find their texts fetched.

# Tags whose content is no running text.
_HIDDEN_TAGS = frozenset(
    (
        "table",
        "ref",
        "references",
        "gallery",
        "math",
        "chem",
        "score",
        "timeline",
        "imagemap",
        "source",
        "syntaxhighlight",
        "pre",
        "hiero",
        "noinclude",
        "includeonly",
        "templatestyles",
        "section",
        "graph",
        "mapframe",
        "inputbox",
    )
)
# Templates that stand for words of a sentence, and which of their parameters are the words: without
# them sentences read "from the Greek, that is" or "a length of and a width of". All others are removed.
_TEMPLATE_TEXT = MappingProxyType(
    {
        "lang": ("2",),
        "transl": ("2",),
        "nowrap": ("1",),
        "sic": ("1",),
        "quote": ("1",),
        "convert": ("1", "2"),
        "cvt": ("1", "2"),
    }
)


def article_markup(dump: Path) -> Iterator[str]:
    """Yield the markup of each article of a compressed MediaWiki dump, in the dump's order.

    Redirects and pages outside the article namespace are left out.

    Raises:
        OSError, EOFError, ElementTree.ParseError: If the file is no compressed MediaWiki dump, or cut short.
    """
    with bz2.open(dump) as stream:
        for _, page in ElementTree.iterparse(stream):
            if page.tag.rpartition("}")[2] == "page":
                redirect, namespace = page.find("{*}redirect"), page.findtext("{*}ns")
                markup = page.findtext("{*}revision/{*}text")
                if redirect is None and namespace == "0" and markup:
                    yield markup
                page.clear()


def plain_text(markup: str) -> str:
    """Return the running text of MediaWiki markup, paragraphs separated by blank lines."""
    import mwparserfromhell

    # Taken out before parsing: a reference or comment that is not closed makes the parser treat the
    # table or link around it as text.
    markup = re.sub(r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>", "", markup, flags=re.DOTALL)
    text = _without_debris("".join(_rendered(mwparserfromhell.parse(markup).nodes)))
    text = re.sub(r"[ \t\u00a0]+", " ", text)
    # Brackets emptied by a removed template, such as a pronunciation or a conversion.
    text = re.sub(r"\((?:\s*[,;:–—-])+\s*", "(", text)
    text = re.sub(r"(?:\s*[,;:])+\s*\)", ")", text)
    text = re.sub(r" ?\(\s*\)| ?\[\s*\]", "", text)
    text = re.sub(r" +([,.;:!?)])(?=\s|$)", r"\1", text)
    lines = [line.strip(" ").lstrip(",;: ") for line in text.split("\n")]
    # Punctuation alone is what remains of a list item or an indented formula that was removed.
    lines = [line for line in lines if line == "" or re.search(r"\w", line)]
    return _without_empty_sections(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())


def _without_debris(text: str) -> str:
    """Remove markup that is not well formed, which the parser leaves in the text."""
    text = re.sub(r"\[\[(?:file|image|category):[^\n]*", "", text, flags=re.IGNORECASE)
    text = re.sub(r"^[ :*#]*(?:\{\||\||!).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[\[(?:[^\[\]|\n]*\|)?([^\[\]|\n]*)\]\]", r"\1", text)
    text = re.sub(r"\{\{[^{}]*\}\}|</?[a-z][^<>\n]*>|__[A-Z]+__", "", text)
    return re.sub(r"\[\[|\]\]|\{\{|\}\}|'{3,}", "", text)


# Marks a heading until empty sections are dropped; private use, so it cannot be in an article.
_HEADING = "\ue000"


def _without_empty_sections(text: str) -> str:
    """Drop headings with no text before the next heading of the same or a higher level."""
    kept: list[str] = []
    following = 1  # level of the heading that comes next, 0 where text does; the end counts as a heading
    for line in reversed(text.split("\n")):
        level = len(line) - len(line.lstrip(_HEADING))
        if level and following != 0 and following <= level:
            continue
        if level or line.strip():
            following = level
        kept.append(line.lstrip(_HEADING))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(reversed(kept)).strip())


def _rendered(nodes: Iterable[Any]) -> Iterator[str]:
    """Yield the visible text of parsed markup; strip_code() would keep table cells and image options."""
    from mwparserfromhell import nodes as kinds

    for node in nodes:
        if isinstance(node, kinds.Text):
            yield str(node.value)
        elif isinstance(node, kinds.Wikilink):
            # A colon names a file, a category or another language's article; none is running text.
            title = str(node.title)
            if ":" not in title or title.startswith(":") or " " in title.partition(":")[0].strip():
                yield from _rendered(node.text.nodes if node.text is not None else node.title.nodes)
            elif node.text is not None and not re.match(
                r"\s*(?:file|image|category)\s*:", title, re.IGNORECASE
            ):
                yield from _rendered(node.text.nodes)
        elif isinstance(node, kinds.ExternalLink):
            if node.brackets and node.title is not None:
                yield from _rendered(node.title.nodes)
        elif isinstance(node, kinds.Heading):
            yield "\n" + _HEADING * node.level + "".join(_rendered(node.title.nodes)).strip() + "\n"
        elif isinstance(node, kinds.Template):
            for parameter in _TEMPLATE_TEXT.get(str(node.name).strip().lower(), ()):
                if node.has(parameter):
                    yield from _rendered(node.get(parameter).value.nodes)
                    yield " "
        elif isinstance(node, kinds.HTMLEntity):
            yield str(node.normalize())
        elif isinstance(node, kinds.Tag):
            name = str(node.tag).strip().lower()
            if name == "br":
                yield "\n"
            elif name not in _HIDDEN_TAGS and node.contents is not None:
                yield from _rendered(node.contents.nodes)
