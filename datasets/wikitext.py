"""Plain Wikipedia text to articles, and articles to sentences.

Three forms of text are told apart by their first line that is not blank:

    <doc id="12" title="Anarchism">      WikiExtractor: an article ends at </doc>
     = Robert Boulter =                  WikiText: an article begins at a heading of the first level
    anything else                        articles stand apart by blank lines
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import regex

_HEADING = re.compile(r"^\s*(=(?: =)*|=+)\s+(\S.*?)\s+\1\s*$")
_ENDS_SENTENCE = regex.compile(r"""[:;\p{STerm}]["'”’)\]\s]*$""")


def articles(lines: Iterable[str]) -> Iterator[list[str]]:
    """The articles in `lines`, each a list of paragraphs without headings or tags; empty ones are passed over."""
    remaining = iter(lines)
    first = next((line for line in remaining if line.strip()), "")
    if first.lstrip().startswith("<doc"):
        split = _tagged
    elif _level(first) == 1:
        split = _headed
    else:
        split = _blank_separated
    for article in split(_chain(first, remaining)):
        paragraphs = [" ".join(paragraph.split()) for paragraph in article]
        if any(paragraphs):
            yield [paragraph for paragraph in paragraphs if paragraph]


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _tagged(lines: Iterator[str]) -> Iterator[list[str]]:
    article: list[str] = []
    title = ""
    for line in lines:
        text = line.strip()
        if text.startswith("<doc"):
            article, title = [], _attribute(text, "title")
        elif text.startswith("</doc"):
            yield article
            article = []
        elif text and not (text == title and not article):  # WikiExtractor repeats the title as the first line
            article.append(text)
    yield article


def _headed(lines: Iterator[str]) -> Iterator[list[str]]:
    article: list[str] = []
    before = ""
    for line in lines:
        level = _level(line)
        if level == 1 and _may_precede_title(before):
            yield article
            article = []
        elif level == 0:
            article.append(line)
        before = line
    yield article


def _blank_separated(lines: Iterator[str]) -> Iterator[list[str]]:
    article: list[str] = []
    for line in lines:
        if line.strip():
            if _level(line) == 0:
                article.append(line)
        elif article:
            yield article
            article = []
    yield article


def _level(line: str) -> int:
    """1 for ` = Title = `, 2 for ` = = Section = = ` or `== Section ==`, 0 for text."""
    found = _HEADING.match(line)
    return found.group(1).count("=") if found else 0


def _may_precede_title(line: str) -> bool:
    """False after an unfinished sentence of prose, where ` = 1 henry and capacitance C = ` is part of a formula."""
    return bool(_ENDS_SENTENCE.search(line)) or _level(line) > 0 or len(sentences(line)) < 2


def _attribute(tag: str, name: str) -> str:
    found = re.search(rf'{name}="([^"]*)"', tag)
    return found.group(1) if found else ""


# . ! and ? end a sentence before white space and a capital, a digit, a letter of a script without capitals or an
# opening mark; the marks of other scripts (。 ؟ । ። ...) before anything but a small letter, white space or not.
_CLOSING = r"""["'”’»\p{Pe}\p{Pf}]*"""
_OPENING = r"""["'“‘«\p{Pi}]?\s?"""
_END_WITH_CASE, _END_WITHOUT_CASE = (
    regex.compile(
        rf"(?P<mark>[.!?…]+){_CLOSING}(?P<gap>\s+)(?={_OPENING}[{begins}])"
        rf"|(?P<mark>[\p{{STerm}}--[.!?]]+){_CLOSING}(?P<gap>\s*)(?=[\S--\p{{Ll}}])",
        regex.V1,
    )
    for begins in (r"\p{Lu}\p{Lt}\p{Lo}\p{N}", r"\p{L}\p{N}")
)
_ABBREVIATED = """
    mr mrs ms dr prof sr jr st mt ft gen col lt capt cmdr maj sgt adm rev hon gov sen rep pres vs etc al ca c
    cf no nos vol vols pp p ed eds fig figs op approx dept est inc ltd co corp bros jan feb mar apr jun jul aug
    sep sept oct nov dec e.g i.e u.s u.k ph.d d.c b.c a.d a.m p.m
"""
_ABBREVIATIONS = frozenset(_ABBREVIATED.split())
_INITIALS = regex.compile(r"^(?:\p{Lu}|(?:\p{Lu}\.)+\p{Lu})$")
_WIKITEXT_JOINS = re.compile(r" @([-,.])@ ")


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, in order; joined they give it back, up to white space.

    WikiText's ` @-@ ` is undone. Abbreviations and initials end no sentence: a wrong join costs less than a cut. Where
    a paragraph has no capitals at all, a sentence may begin with a small letter.

    >>> sentences("Dr. Boulter met J. F. Kennedy in the U.S. in 1962. He left at 5 p.m. on Monday .")
    ['Dr. Boulter met J. F. Kennedy in the U.S. in 1962.', 'He left at 5 p.m. on Monday .']
    >>> sentences("他走了。她来了！")
    ['他走了。', '她来了！']
    """
    text = " ".join(_WIKITEXT_JOINS.sub(r"\1", paragraph).split())
    ends = _END_WITHOUT_CASE if text == text.lower() else _END_WITH_CASE
    found, start = [], 0
    for end in ends.finditer(text):
        if _is_end(text, end):
            found.append(text[start : end.start("gap")])
            start = end.end("gap")
    rest = text[start:]
    return [*found, rest] if rest else found


def _is_end(text: str, end: regex.Match[str]) -> bool:
    if end["mark"] != ".":
        return True
    word = text[: end.start()].rpartition(" ")[2].lstrip("\"'“‘([")
    return not word or not (_INITIALS.match(word) or word.lower() in _ABBREVIATIONS)
