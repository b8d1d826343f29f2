"""Brings a text into the plain form that is scored, so that typography and hidden characters do not decide.

Zero-width and direction marks go, compatibility forms and look-alike letters become the letters they imitate, typographic
quotes and dashes become ASCII, runs of blanks one blank, lines broken inside a paragraph are joined. Texts to calibrate on
go the same way.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_HIDDEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f"
    "\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]"
)
_TYPOGRAPHY = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u00ab": '"',
     "\u00bb": '"', "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "--", "\u2015": "--",
     "\u2212": "-"}
)  # fmt: skip
# Letters of other alphabets that readers take for Latin ones (the most confusable part of Unicode TS 39).
_CYRILLIC = (
    "\u0410\u0412\u0415\u0405\u0406\u0408\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425"
    "\u0430\u0435\u0455\u0456\u0458\u043e\u0440\u0441\u0443\u0445\u0501\u051b\u051d\u04bb",
    "ABESIJKMHOPCTYXaesijopcyxdqwh",
)
_GREEK = (
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03b1\u03bf\u03b9\u03bd",
    "ABEZHIKMNOPTYXaoiv",
)
_LOOK_ALIKE = str.maketrans(_CYRILLIC[0] + _GREEK[0], _CYRILLIC[1] + _GREEK[1])
_IMITATED = re.compile(rf"\w*[{_CYRILLIC[0]}{_GREEK[0]}]\w*")
_LETTER = re.compile(r"[^\W\d_]")
_LINE_BREAK = re.compile(r"(?<=\S)[ \t]*\n[ \t]*(?=\S)")
_PARAGRAPH_BREAK = re.compile(r"[ \t]*\n[ \t]*(?:\n[ \t]*)+")
_BLANKS = re.compile(r"[^\S\n]+")


@dataclass(frozen=True)
class Cleaned:
    """A text as it is scored, and what was done to it.

    Attributes:
        text: the plain form; places in it are characters.
        hidden: zero-width, direction and variation marks that were removed.
        imitated: letters that imitated other letters and were replaced.
        share: of the text's characters, those two together.
    """

    text: str
    hidden: int
    imitated: int
    share: float


def clean(text: str) -> Cleaned:
    """The plain form of a text."""
    marks = len(_HIDDEN.findall(text))
    plain = _HIDDEN.sub("", text).translate(_TYPOGRAPHY)
    imitated = 0
    if not plain.isascii():
        before = sum(plain.count(letter) for letter in set(plain) if _imitates(letter))
        plain, replaced = _without_look_alikes(unicodedata.normalize("NFKC", plain))
        imitated = before + replaced
    plain = _BLANKS.sub(" ", plain.replace("\r\n", "\n").replace("\r", "\n"))
    plain = _LINE_BREAK.sub(" ", plain)
    plain = _PARAGRAPH_BREAK.sub("\n\n", plain).strip()
    return Cleaned(plain, marks, imitated, (marks + imitated) / max(1, len(text)))


def _imitates(letter: str) -> bool:
    """Whether a letter is a full-width, mathematical or other compatibility form of one ASCII letter."""
    form = unicodedata.normalize("NFKC", letter)
    return letter.isalpha() and not letter.isascii() and len(form) == 1 and form.isascii()


def _without_look_alikes(text: str) -> tuple[str, int]:
    if not _IMITATED.search(text):
        return text, 0
    letters = _LETTER.findall(text)
    latin = 2 * sum(letter.isascii() for letter in letters) > len(letters)
    replaced = 0

    def plain(match: re.Match) -> str:
        nonlocal replaced
        word, form = match[0], match[0].translate(_LOOK_ALIKE)
        mixed = any(letter.isascii() and letter.isalpha() for letter in word)
        if not form.isascii() or not (latin or mixed):
            return word
        replaced += sum(a != b for a, b in zip(word, form, strict=True))
        return form

    return _IMITATED.sub(plain, text), replaced
