"""Which language a text is in, as far as its letters tell: enough to see the mix of a corpus in one pass."""

import re

LOOK_AT = 2_000  # characters of a text that are looked at
HAN_WEIGHT = 3  # a Chinese character says about as much as three letters
_CHINESE = re.compile("[\u3400-\u9fff\uf900-\ufaff]+")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]+")
_OTHER = re.compile("[\u0370-\u1fff\u3041-\u30ff\uac00-\ud7af]+")  # Greek to Georgian and beyond, kana, Hangul


def language_of(text: str) -> str:
    """`Chinese`, `English` (any language in Latin letters), `mixed`, `other` or `none` (no letters)."""
    text = text[:LOOK_AT]
    han, latin, other = (sum(map(len, letters.findall(text))) for letters in (_CHINESE, _LATIN, _OTHER))
    chinese = HAN_WEIGHT * han
    letters = chinese + latin + other
    if not letters:
        return "none"
    if other > letters / 2:
        return "other"
    if chinese >= 0.8 * letters:
        return "Chinese"
    return "English" if latin >= 0.8 * letters else "mixed"
