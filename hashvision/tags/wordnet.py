"""Reads what the vocabulary needs of a WordNet from its WN-LMF file, with the package wn."""

import gzip
import lzma
import pathlib
import shutil
import tempfile
import typing
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping

import wn.lmf
import wn.morphy

from hashvision import storage
from hashvision.errors import UserError
from hashvision.tags.hashtags import fold

# Without a database it returns every form that its rules allow, even for #childs and #beachs.
_MORPHY = wn.morphy.Morphy()


class Synset(typing.NamedTuple):
    """One noun synset of a WordNet."""

    id: str
    kind: str  # lexicographer file without "noun."; "" if the WordNet has none
    lemmas: tuple[str, ...]
    definition: str
    relations: int  # number of them


class Lexicon(typing.NamedTuple):
    """The parts of a WordNet that the vocabulary needs, by folded lemma."""

    name: str
    synsets: list[Synset]
    nouns: dict[str, list[int]]  # lemma -> its synsets, commonest first
    forms: dict[str, str]  # irregular form -> lemma
    modifiers: dict[str, int]  # lemma -> number of senses as adjective or adverb
    verbs: dict[str, int]  # lemma -> number of senses as verb


def load_wordnet(path: str) -> Lexicon:
    """Reads a WN-LMF file: XML, plain or compressed with xz or gzip.

    Raises:
      UserError: the file does not exist, is damaged, or is not WN-LMF with nouns.
      OSError: the temporary folder has no space to decompress it.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = pathlib.Path(folder, "wordnet.xml")
        try:
            with (
                storage.open(path) as packed,
                storage.add_path_to_errors(folder),  # the temporary folder may be full
                plain.open("wb") as out,
            ):
                magic = packed.read(6)
                packed.seek(0)
                if magic.startswith(b"\xfd7zXZ"):
                    shutil.copyfileobj(lzma.open(packed), out)
                elif magic.startswith(b"\x1f\x8b"):
                    shutil.copyfileobj(gzip.open(packed), out)
                else:
                    shutil.copyfileobj(packed, out)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise UserError(
                f"The WordNet file {path} cannot be opened ({error.strerror}); give --wordnet a"
                " WN-LMF file, or omit it to merge tags by spelling only."
            ) from None
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the disk; those of gzip itself have no number
            raise UserError(f"The WordNet file {path} is damaged; download it again.") from None
        try:
            lexicons = wn.lmf.load(plain, progress_handler=None)["lexicons"]
            lexicon = _lexicon(lexicons)
        except Exception:  # the parser validates little, so faults can surface as any error
            lexicon = None
    if lexicon is None or not lexicon.nouns:
        raise UserError(
            f"{path} is not a WN-LMF WordNet with nouns; download one, such as Open English WordNet"
            " from https://en-word.net."
        )
    return lexicon


def _lexicon(lexicons: typing.Any) -> Lexicon:
    """Reduces parsed WN-LMF to a Lexicon; keys that the file omits are absent from `lexicons`."""
    synsets: list[Synset] = []
    number: dict[str, int] = {}
    nouns: dict[str, list[tuple[bool, int]]] = defaultdict(list)
    forms: dict[str, str] = {}
    modifiers: Counter[str] = Counter()
    verbs: Counter[str] = Counter()
    for lexicon in lexicons:
        entries = lexicon.get("entries", [])
        written: dict[str, list[str]] = defaultdict(list)  # synset -> lemmas
        for entry in entries:
            for sense in entry.get("senses", []):
                written[sense["synset"]].append(entry["lemma"]["writtenForm"])
        parsed = [s for s in lexicon.get("synsets", []) if s.get("partOfSpeech") == "n"]
        kinds = {s["id"]: (s.get("lexfile") or "").removeprefix("noun.") for s in parsed}
        for synset in parsed:
            relations = synset.get("relations", [])
            kind = kinds[synset["id"]]
            if kind == "Tops":  # roots of the other files; take the kind of most children
                below = (kinds.get(r["target"]) for r in relations if r["relType"] == "hyponym")
                kind = Counter(k for k in below if k).most_common(1)
                kind = kind[0][0] if kind else "Tops"
            definitions = synset.get("definitions", [])
            number[synset["id"]] = len(synsets)
            synsets.append(
                Synset(
                    id=synset["id"],
                    kind=kind,
                    lemmas=tuple(written[synset["id"]]),
                    definition=definitions[0]["text"] if definitions else "",
                    relations=len(relations),
                )
            )
        for entry in entries:
            lemma, part = entry["lemma"]["writtenForm"], entry["lemma"]["partOfSpeech"]
            folded = fold(lemma)
            senses = entry.get("senses", [])
            if part == "n" and folded:
                # Senses are in order of frequency within an entry. A capitalised entry is a name
                # ('Friend', the Quaker) and comes after the common noun.
                name = lemma != lemma.lower()
                nouns[folded] += [(name, number[s["synset"]]) for s in senses]
                for form in entry.get("forms", []):
                    forms.setdefault(fold(form["writtenForm"]), folded)
            elif part in ("a", "s", "r"):
                modifiers[folded] += len(senses)
            elif part == "v":
                verbs[folded] += len(senses)
    ordered = {
        lemma: list(dict.fromkeys(number for _, number in sorted(senses, key=lambda s: s[0])))
        for lemma, senses in nouns.items()
        if senses
    }
    name = "+".join(f"{lexicon['id']}:{lexicon['version']}" for lexicon in lexicons)
    return Lexicon(name, synsets, ordered, forms, dict(modifiers), dict(verbs))


def singulars(tag: str) -> list[str]:
    """Possible singulars of a folded tag, by the detachment rules of wn."""
    return sorted(_MORPHY(tag, pos="n").get("n", set()) - {tag})


def dominant_part_of_speech(lemma: str, lexicon: Lexicon) -> str | None:
    """The main part of speech of a word that is rarely a noun, by its senses; None for a noun.

    #small can also be a part of the back, and #have a rich person; #dress and #uniform stay nouns.
    """
    nouns = len(lexicon.nouns[lemma])
    if lexicon.modifiers.get(lemma, 0) > 4 * nouns:
        return "an adjective or adverb"
    return "a verb" if lexicon.verbs.get(lemma, 0) > 10 * nouns else None


def choose_sense(lemma: str, uses: Mapping[str, int], lexicon: Lexicon) -> int:
    """Chooses the most likely synset of an ambiguous tag: the first sense, or one of the same kind.

    WordNet's first sense is its commonest and sets the kind (#cat is an animal, despite #guy). Each
    sense of that kind gets a score. It adds the uses of the synset's other lemmas whose first sense
    it is, divided by the tag's own uses, at most 1 (#bicycle supports one sense of #bike). It adds
    the synset's share of the relations of all these senses. It subtracts one half for each place in
    WordNet's order.
    """
    first = lexicon.nouns[lemma][0]
    senses = [
        number
        for number in lexicon.nouns[lemma]
        if lexicon.synsets[number].kind == lexicon.synsets[first].kind
    ]
    relations = sum(lexicon.synsets[number].relations for number in senses)

    def score(rank: int, number: int) -> float:
        synset = lexicon.synsets[number]
        others = {fold(other) for other in synset.lemmas} - {lemma}
        support = sum(uses.get(o, 0) for o in others if lexicon.nouns.get(o, [-1])[0] == number)
        central = synset.relations / max(1, relations)
        return min(1.0, support / max(1, uses.get(lemma, 0))) + central - rank / 2

    return max(enumerate(senses), key=lambda ranked: score(*ranked))[1]
