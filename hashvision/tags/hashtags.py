"""Text to hashtags: which runs of a caption are tags, and when two spellings are one tag.

Tags have the form of Unicode's hashtag identifiers (UAX #31, definition D2), without emoji, plus
and minus signs, which name no class:

    start continue* (medial continue+)*
"""

import re
import unicodedata
from collections.abc import Iterator

HASH_SIGNS = "#\uff03\ufe5f"
LONGEST_TAG = 100  # characters; Instagram's and Twitter's limits lie near

# An address may hold '#', which there starts a fragment: https://..., www...., example.com/...
# The look-behinds keep the search linear in the text, whatever the text.
_ADDRESS = re.compile(
    r"(?<![a-z0-9+.-])(?:[a-z][a-z0-9+.-]*://|www\.)\S+|(?<![\w.-])[\w-]+(?:\.[\w-]+)+/\S*",
    re.IGNORECASE,
)
_MENTION = re.compile(r"(?<!\w)@[\w.]+")
# What stands within words, between two of their characters, and goes when they are folded. Of UAX
# #31 (table 3a, and what it lets identifiers continue with) and Twitter's list that is:
_MEDIAL = (
    "\u00b7\u0387\u2027"  # the middle dot of Catalan's l·l, as Greek has it, as dictionaries do
    "\u200c\u200d"  # the joiners of Persian and Indic words; elsewhere they are joints of emoji
    "\u05f3\u05f4"  # Hebrew's geresh and gershayim
    "\u0f0b\u0f0c"  # between Tibetan syllables
    "\u30fb\uff65\u30a0"  # between foreign words in Katakana
)
# Marks that are accents of a Latin vowel: of stress, tone, length or a nasal.
_VOWELS = "aeiouy\u00e6\u00f8\u0153\u0131"
_ACCENTS = "\u0300\u0301\u0302\u0303\u0304\u0309\u030f\u0311\u0323"
# ... and of some vowels alone: the diaeresis of naïve, the dot of İ in lower case.
_ACCENTS_OF = {"\u0308": "eiy", "\u0307": "i"}


def _is_letter(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "L" or category == "Nl"


def _is_mark(character: str) -> bool:
    """Combining marks, less the variation selectors and keycaps that belong to emoji."""
    return unicodedata.category(character) in ("Mn", "Mc") and not "\ufe00" <= character <= "\ufe0f"


def _is_word(character: str) -> bool:
    return (
        _is_letter(character)
        or unicodedata.category(character) == "Nd"
        or character in "_\uff3f"
        or _is_mark(character)
    )


def _run_end(text: str, start: int) -> int:
    """End of the run of word characters that starts at `start`; `start` where there is none."""
    end = start
    while end < len(text):
        joined = text[end] in _MEDIAL and end > start and end + 1 < len(text)
        if not (_is_word(text[end]) or (joined and _is_word(text[end + 1]))):
            break
        end += 1
    return end


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each tag in `text`, the hash sign included."""
    previous_end = 0  # where the last tag ended: '#a#b' runs two tags together
    position = 0
    while position < len(text):
        if text[position] not in HASH_SIGNS:
            position += 1
            continue
        before = text[position - 1] if position else " "
        start = position + 1
        end = _run_end(text, start)
        run = text[start:end]
        # 'C#' and 'word#word' are words, '&#x27;' is a character reference, '#1' is a rank.
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
    """The hashtags of a post's text, as typed and in order, without their hash signs.

    A tag is a hash sign (also full-width or small) and a run of letters, combining marks, digits
    and underscores of any script, with at least one letter; signs that stand within words, such as
    a middle dot, may join two of these. It does not start right after a word
    ('C#', 'word#word'), unless that word is itself a tag ('#a#b'), nor inside an address.
    """
    text = _ADDRESS.sub(_blank, text)
    return [text[start + 1 : end] for start, end in _spans(text)]


def words(text: str) -> list[str]:
    """The folded words of a post's text outside its tags, mentions and addresses, in order."""
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
    """Whether a mark on a letter goes: all do in Greek, and those in Latin that make no letter."""
    name = unicodedata.name(letter, "")
    if not name.startswith("LATIN "):
        return name.startswith("GREEK ")
    if letter in (_VOWELS if mark in _ACCENTS else _ACCENTS_OF.get(mark, "")):
        return True
    return len(unicodedata.normalize("NFC", letter + mark)) > 1  # struck through, say


def _fold_once(tag: str) -> str:
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", tag).casefold())
    kept: list[str] = []
    letter = ""  # the last that is no mark
    for character in decomposed:
        if not _is_mark(character):
            letter = character
        elif letter and _is_accent(letter, character):
            continue
        if _is_word(character) and character != "_":
            kept.append(character)
    return unicodedata.normalize("NFKC", "".join(kept))


def fold(tag: str) -> str:
    """The form in which two spellings of one tag meet; also squeezes a phrase into a tag.

    Compatibility forms, case, underscores and everything else that cannot stand in a tag go:
    'Ice_Cream', 'ice cream' and 'ICE-CREAM' are 'icecream'. So do accents: of Greek letters, and of
    Latin vowels the acute, grave, circumflex, tilde and macron, the diaeresis of e, i and y, and
    Vietnamese tones. 'Café' is 'cafe', 'São' 'sao'. A mark that makes a letter of its own
    stays: on a consonant, and the ring, ogonek, breve, caron, horn, double acute and the diaeresis
    of a, o and u. 'Año' is not 'ano', 'schön' not 'schon'. Marks of other scripts stay, for
    there they are vowels. Idempotent; may be empty.

    Tags have no language, so this errs. Words stay apart that people also write without the letter
    (#münchen and #munchen, #façade and #facade, #jalapeño and WordNet's jalapeno). Words
    meet that a language tells apart by an accent which others leave out (Italian's #papà and
    #papa, Hungarian's #kér and #ker, most tones of Vietnamese).
    """
    folded = _fold_once(tag)
    # Folding may bring forth a character that folds again (a ligature of accented letters, say).
    while folded != (again := _fold_once(folded)):
        folded = again
    return folded
