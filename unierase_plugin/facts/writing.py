"""How scripts write words: scripts without spaces, Korean particles, and the places of whole words."""

from __future__ import annotations

import regex

#: Letters of scripts without spaces, as a set for `regex`, version 1: Chinese, Japanese, Yi, and the scripts that break
#: lines between words without a space (UAX 14, class SA), such as Burmese, Khmer, Lao and Thai.
UNSPACED = r"[[\p{lb=SA}\p{scx=Hani}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{scx=Yiii}]&&[\p{L}\p{M}\p{Nl}]]"
IS_UNSPACED = regex.compile(rf"(?V1){UNSPACED}")
#: Marks that end a sentence without a space after them: Chinese and Japanese, Indic, Urdu, Ethiopic.
SENTENCE_MARKS = "\u3002\uff01\uff1f\u0964\u06d4\u1362"
HANGUL = regex.compile(r"\p{Hangul}")

#: What Korean writes after a noun without a space: particles, single or in pairs, and the copula.
PARTICLES = (
    "은|는|이|가|을|를|의|에|와|과|도|만|뿐|께|랑|이랑|하고|로|으로|에서|에게|"
    "한테|께서|에게서|한테서|로서|으로서|로써|으로써|까지|부터|보다|처럼|마다|조차|마저|"
    "밖에|나|이나|란|이란|라|이라|라고|이라고|라는|이라는|에는|에도|에만|에서는|에서도|"
    "에서의|에게는|에게도|로는|으로는|로도|으로도|와는|과는|와의|과의|와도|과도|까지는|"
    "까지도|부터는|만은|만이|만을|다|이다|였다|이었다|며|이며|고|이고|인|인데|지만|"
    "이지만|입니다|였습니다|이었습니다|예요|이에요|에요|였어요|이었어요|죠|이죠|네요|이네요|"
    "요"
)
_INSIDE = rf"[\w--{UNSPACED}]"


def standing(text: str, name: str, *, ignore_case: bool = False) -> list[tuple[int, int]]:
    """The places (start, end) at which the name stands in the text as whole words, in order.

    In a script with spaces, no letter comes right before or after it, and no mark changes its last letter. A Korean
    name may be followed by a particle. In a script without spaces, every occurrence counts.
    """
    if not name:
        return []
    before = "" if IS_UNSPACED.match(name) else f"(?<!{_INSIDE})"
    after = r"(?!\p{M})" if IS_UNSPACED.match(name[-1]) else f"(?!{_INSIDE})"
    if HANGUL.match(name[-1]):
        after = f"(?=(?:{PARTICLES})?{after})"
    flags = regex.IGNORECASE if ignore_case else 0
    found = regex.finditer(f"(?V1){before}{regex.escape(name, literal_spaces=True)}{after}", text, flags=flags)
    return [match.span() for match in found]
