"""Text to hashtags: which runs of a caption are tags, and when two spellings are one tag."""

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
# Zero-width joiner and non-joiner spell words in Persian and in Indic scripts; elsewhere they are
# joints of emoji, which is why they count only between two word characters.
_JOINERS = "\u200c\u200d"


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
        joined = text[end] in _JOINERS and end > start and end + 1 < len(text)
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

    A tag is a hash sign (also full-width) and a run of letters, combining marks, digits and
    underscores of any script, with at least one letter. It does not start right after a word
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


def _fold_once(tag: str) -> str:
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", tag).casefold())
    kept: list[str] = []
    latin = False  # whether the last base character was Latin
    for character in decomposed:
        if _is_mark(character):
            if latin:
                continue  # an accent; in other scripts marks are vowels and stay
        else:
            latin = unicodedata.name(character, "").startswith("LATIN ")
        if _is_word(character) and character != "_":
            kept.append(character)
    return unicodedata.normalize("NFKC", "".join(kept))


def fold(tag: str) -> str:
    """The form in which two spellings of one tag meet; also squeezes a phrase into a tag.

    Compatibility forms, case, Latin accents, underscores and everything else that cannot stand
    in a tag go: 'Ice_Cream', 'ice cream' and 'ICE-CREAM' are 'icecream'. Marks of other scripts
    stay, for there they are vowels. Idempotent; may be empty.
    """
    folded = _fold_once(tag)
    # Folding may bring forth a character that folds again (a ligature of accented letters, say).
    while folded != (again := _fold_once(folded)):
        folded = again
    return folded
