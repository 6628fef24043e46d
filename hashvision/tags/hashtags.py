"""Extracts hashtags from captions, and folds the spellings of a tag to one form.

Tags follow Unicode's hashtag identifiers (UAX #31, definition D2), except that emoji and plus and
minus signs are not part of a tag, because they name no class:

    start continue* (medial continue+)*
"""

import re
import unicodedata
from collections.abc import Iterator

HASH_SIGNS = "#\uff03\ufe5f"
LONGEST_TAG = 100  # characters; near the limits of Instagram and Twitter

# In a URL '#' starts a fragment, not a tag: https://..., www...., example.com/...
# The look-behinds keep the search linear in the length of any text.
_ADDRESS = re.compile(
    r"(?<![a-z0-9+.-])(?:[a-z][a-z0-9+.-]*://|www\.)\S+|(?<![\w.-])[\w-]+(?:\.[\w-]+)+/\S*",
    re.IGNORECASE,
)
_MENTION = re.compile(r"(?<!\w)@[\w.]+")
# Characters that join two characters of a word, and that folding removes. From UAX #31 (table 3a,
# and its characters that may continue an identifier) and Twitter's list:
_MEDIAL = (
    "\u00b7\u0387\u2027"  # the middle dot of Catalan's l·l, also in its Greek and dictionary forms
    "\u200c\u200d"  # the joiners in Persian and Indic words; otherwise they join emoji
    "\u05f3\u05f4"  # Hebrew's geresh and gershayim
    "\u0f0b\u0f0c"  # between Tibetan syllables
    "\u30fb\uff65\u30a0"  # between foreign words in Katakana
)
# Marks that are accents on any Latin vowel: stress, tone, length or nasalization.
_VOWELS = "aeiouy\u00e6\u00f8\u0153\u0131"
_ACCENTS = "\u0300\u0301\u0302\u0303\u0304\u0309\u030f\u0311\u0323"
# Marks that are accents on some vowels only: the diaeresis of naïve, the dot of lower-case İ.
_ACCENTS_OF = {"\u0308": "eiy", "\u0307": "i"}


def _is_letter(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "L" or category == "Nl"


def _is_mark(character: str) -> bool:
    """Whether a character is a combining mark, but not an emoji's variation selector or keycap."""
    return unicodedata.category(character) in ("Mn", "Mc") and not "\ufe00" <= character <= "\ufe0f"


def _is_word(character: str) -> bool:
    return (
        _is_letter(character)
        or unicodedata.category(character) == "Nd"
        or character in "_\uff3f"
        or _is_mark(character)
    )


def _run_end(text: str, start: int) -> int:
    """End of the run of word characters that starts at `start`; `start` if there is none."""
    end = start
    while end < len(text):
        joined = text[end] in _MEDIAL and end > start and end + 1 < len(text)
        if not (_is_word(text[end]) or (joined and _is_word(text[end + 1]))):
            break
        end += 1
    return end


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of each tag in `text`, including the hash sign."""
    previous_end = 0  # end of the last tag, since '#a#b' is two tags
    position = 0
    while position < len(text):
        if text[position] not in HASH_SIGNS:
            position += 1
            continue
        before = text[position - 1] if position else " "
        start = position + 1
        end = _run_end(text, start)
        run = text[start:end]
        # 'C#' and 'word#word' are words, '&#x27;' is a character reference, '#1' is a number.
        opens = not (_is_word(before) or before == "&") or position == previous_end > 0
        if (
            opens
            and run
            and not _is_mark(run[0])
            and len(run) <= LONGEST_TAG
            and any(map(_is_letter, run))
        ):
            yield position, end
            previous_end = end
        position = max(end, start)


def _blank(match: re.Match[str]) -> str:
    return " " * len(match.group())


def extract(text: str) -> list[str]:
    """Extracts the hashtags of a post's text, as typed and in order, without their hash signs.

    A tag is a hash sign (also full-width or small) and a run of letters, combining marks, digits
    and underscores of any script, with at least one letter. Signs that occur within words, such as
    a middle dot, may join two of these characters. A tag does not start inside a URL or directly
    after a word ('C#', 'word#word'), unless that word is a tag itself ('#a#b').
    """
    text = _ADDRESS.sub(_blank, text)
    return [text[start + 1 : end] for start, end in _spans(text)]


def words(text: str) -> list[str]:
    """Extracts the folded words of a text outside its tags, mentions and URLs, in order."""
    text = _ADDRESS.sub(_blank, text)
    kept, last = [], 0
    for start, end in _spans(text):
        kept.append(text[last:start])
        last = end
    rest = _MENTION.sub(" ", " ".join([*kept, text[last:]]))
    found, position = [], 0
    while position < len(rest):
        end = _run_end(rest, position)
        if 0 < end - position <= LONGEST_TAG:
            word = fold(rest[position:end])
            if any(map(_is_letter, word)):
                found.append(word)
        position = max(end, position + 1)
    return found


def _is_accent(letter: str, mark: str) -> bool:
    """Whether folding removes a mark: any in Greek; in Latin, those that make no new letter."""
    name = unicodedata.name(letter, "")
    if not name.startswith("LATIN "):
        return name.startswith("GREEK ")
    if letter in (_VOWELS if mark in _ACCENTS else _ACCENTS_OF.get(mark, "")):
        return True
    return len(unicodedata.normalize("NFC", letter + mark)) > 1  # such as a strike-through


def _fold_once(tag: str) -> str:
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", tag).casefold())
    kept: list[str] = []
    letter = ""  # the last character that is not a mark
    for character in decomposed:
        if not _is_mark(character):
            letter = character
        elif letter and _is_accent(letter, character):
            continue
        if _is_word(character) and character != "_":
            kept.append(character)
    return unicodedata.normalize("NFKC", "".join(kept))


def fold(tag: str) -> str:
    """Folds the spellings of a tag to one form; also turns a phrase into a tag.

    Folding removes compatibility forms, case, underscores and everything else that a tag cannot
    contain: 'Ice_Cream', 'ice cream' and 'ICE-CREAM' become 'icecream'. It removes the accents of
    Greek letters. From Latin vowels it removes the acute, grave, circumflex, tilde and macron, the
    diaeresis of e, i and y, and Vietnamese tones: 'Café' becomes 'cafe' and 'São' becomes 'sao'.

    Marks that make a different letter stay: all marks on consonants, and the ring, ogonek, breve,
    caron, horn, double acute and the diaeresis of a, o and u. 'Año' does not become 'ano', nor
    'schön' 'schon'. Marks of other scripts stay because they are vowels there. Folding is
    idempotent; the result may be empty.

    Tags have no language, so folding makes errors. It separates words that people also write with a
    plain letter (#münchen and #munchen, #façade and #facade, #jalapeño and WordNet's jalapeno). It
    merges words that differ by an accent which other languages omit (Italian's #papà and #papa,
    Hungarian's #kér and #ker, most tones of Vietnamese).
    """
    folded = _fold_once(tag)
    # Folding can produce a character that folds again, such as from a ligature of accented letters.
    while folded != (again := _fold_once(folded)):
        folded = again
    return folded
