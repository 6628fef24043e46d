"""Tests of reading WordNets and choosing senses."""

import errno
import gzip
import lzma
import os
import pathlib
import tempfile

import pytest

from full_disk import files_of_at_most
from hashvision.errors import UserError
from hashvision.tags import wordnet

HEADER = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE LexicalResource SYSTEM "http://globalwordnet.github.io/schemas/WN-LMF-1.1.dtd">
<LexicalResource xmlns:dc="https://globalwordnet.github.io/schemas/dc/">
<Lexicon id="small" label="Small" language="en" email="a@b.c" license="none" version="1">
"""
ENTRIES = """
<LexicalEntry id="e1"><Lemma writtenForm="brown bear" partOfSpeech="n"/>
  <Sense id="e1-1" synset="bear"/></LexicalEntry>
<LexicalEntry id="e2"><Lemma writtenForm="Ursus arctos" partOfSpeech="n"/>
  <Sense id="e2-1" synset="bear"/></LexicalEntry>
<LexicalEntry id="e3"><Lemma writtenForm="Friend" partOfSpeech="n"/>
  <Sense id="e3-1" synset="quaker"/></LexicalEntry>
<LexicalEntry id="e4"><Lemma writtenForm="friend" partOfSpeech="n"/>
  <Sense id="e4-1" synset="pal"/></LexicalEntry>
<LexicalEntry id="e5"><Lemma writtenForm="ox" partOfSpeech="n"/><Form writtenForm="oxen"/>
  <Sense id="e5-1" synset="ox"/></LexicalEntry>
<LexicalEntry id="e6"><Lemma writtenForm="bear" partOfSpeech="v"/>
  <Sense id="e6-1" synset="carry"/></LexicalEntry>
<LexicalEntry id="e7"><Lemma writtenForm="small" partOfSpeech="a"/>
  <Sense id="e7-1" synset="little"/></LexicalEntry>
<LexicalEntry id="e8"><Lemma writtenForm="animal" partOfSpeech="n"/>
  <Sense id="e8-1" synset="animal"/></LexicalEntry>
"""
SYNSETS = """
<Synset id="bear" ili="" partOfSpeech="n" lexfile="noun.animal"><Definition>a bear</Definition>
  <SynsetRelation relType="hypernym" target="animal"/></Synset>
<Synset id="ox" ili="" partOfSpeech="n" lexfile="noun.animal"/>
<Synset id="quaker" ili="" partOfSpeech="n" lexfile="noun.person"/>
<Synset id="pal" ili="" partOfSpeech="n"/>
<Synset id="carry" ili="" partOfSpeech="v" lexfile="verb.motion"/>
<Synset id="little" ili="" partOfSpeech="a" lexfile="adj.all"/>
<Synset id="animal" ili="" partOfSpeech="n" lexfile="noun.Tops">
  <SynsetRelation relType="hyponym" target="bear"/>
  <SynsetRelation relType="hyponym" target="ox"/></Synset>
"""
SMALL = (HEADER + ENTRIES + SYNSETS + "</Lexicon></LexicalResource>").encode()


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress])
def test_reads_plain_and_packed_files(tmp_path: pathlib.Path, pack):
    path = tmp_path / "wordnet"
    path.write_bytes(pack(SMALL))
    lexicon = wordnet.load_wordnet(str(path))
    assert lexicon.name == "small:1"
    (bear,) = {*lexicon.nouns["brownbear"], *lexicon.nouns["ursusarctos"]}
    expected = wordnet.Synset("bear", "animal", ("brown bear", "Ursus arctos"), "a bear", 1)
    assert lexicon.synsets[bear] == expected
    assert [lexicon.synsets[s].id for s in lexicon.nouns["friend"]] == ["pal", "quaker"]
    assert [lexicon.synsets[s].kind for s in lexicon.nouns["friend"]] == ["", "person"]
    assert (
        lexicon.synsets[lexicon.nouns["animal"][0]].kind == "animal"
    )  # a root has the kind of its children
    assert lexicon.forms == {"oxen": "ox"}
    assert (lexicon.verbs, lexicon.modifiers) == ({"bear": 1}, {"small": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be opened"),
        (b"", "not a WN-LMF WordNet"),
        (b"dog, cat", "not a WN-LMF WordNet"),
        (SMALL[: len(SMALL) // 2], "not a WN-LMF WordNet"),
        (lzma.compress(SMALL)[:-100], "damaged"),
        (gzip.compress(SMALL)[:-100], "damaged"),
        (lzma.compress(SMALL)[:-20] + b"x" * 20, "damaged"),
        (gzip.compress(SMALL)[:40] + b"\xff" * 99, "damaged"),
        ((HEADER + "</Lexicon></LexicalResource>").encode(), "not a WN-LMF WordNet"),
    ],
)
def test_a_file_that_is_not_a_wordnet_is_named(tmp_path: pathlib.Path, content, message: str):
    path = tmp_path / "wordnet.xml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        wordnet.load_wordnet(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress])
def test_a_full_temporary_folder_is_not_reported_as_a_damaged_file(tmp_path: pathlib.Path, pack):
    path = tmp_path / "wordnet.xml"
    path.write_bytes(pack(SMALL))
    with files_of_at_most(100), pytest.raises(OSError) as caught:
        wordnet.load_wordnet(str(path))
    assert caught.value.errno == errno.EFBIG
    assert os.path.dirname(str(caught.value.filename)) == tempfile.gettempdir()


@pytest.mark.parametrize(
    ("plural", "singular"),
    [("dogs", "dog"), ("childs", "child"), ("beachs", "beach"), ("beaches", "beach")]
    + [("firemen", "fireman"), ("puppies", "puppy"), ("babys", "baby"), ("knives", "knife")],
)
def test_singulars(plural: str, singular: str):
    assert singular in wordnet.singulars(plural)
    assert plural not in wordnet.singulars(plural)


def lexicon_of(*synsets: tuple[str, str, str, int]) -> wordnet.Lexicon:
    """A lexicon of (id, kind, "lemma lemma", relations); senses in the order given."""
    made = [wordnet.Synset(i, kind, tuple(words.split()), "", n) for i, kind, words, n in synsets]
    nouns: dict[str, list[int]] = {}
    for number, synset in enumerate(made):
        for lemma in synset.lemmas:
            nouns.setdefault(lemma, []).append(number)
    return wordnet.Lexicon("test:1", made, nouns, {}, {}, {})


def test_uses_of_other_lemmas_support_a_sense():
    lexicon = lexicon_of(
        ("motorcycle", "artifact", "motorcycle bike", 6),
        ("bicycle", "artifact", "bicycle bike", 18),
    )
    assert wordnet.choose_sense("bike", {"bike": 100}, lexicon) == 0
    assert wordnet.choose_sense("bike", {"bike": 100, "bicycle": 40}, lexicon) == 1
    assert wordnet.choose_sense("bike", {"bike": 100, "motorcycle": 80}, lexicon) == 0
    assert wordnet.choose_sense("bicycle", {"bike": 100}, lexicon) == 1


def test_other_lemmas_do_not_change_the_kind():
    lexicon = lexicon_of(("feline", "animal", "cat", 5), ("guy", "person", "guy cat", 1))
    assert wordnet.choose_sense("cat", {"cat": 15, "guy": 500}, lexicon) == 0


def test_rare_senses_are_not_chosen():
    lexicon = lexicon_of(
        ("youth", "person", "boy malechild", 19),
        ("chap", "person", "boy", 3),
        ("offspring", "person", "son boy", 3),
    )
    assert wordnet.choose_sense("boy", {"boy": 400, "son": 400}, lexicon) == 0


def test_words_that_are_rarely_nouns():
    lexicon = lexicon_of(("back", "body", "small have uniform", 2))
    lexicon.modifiers.update(small=11, uniform=4)
    lexicon.verbs.update(have=19, uniform=1)
    assert wordnet.dominant_part_of_speech("small", lexicon) == "an adjective or adverb"
    assert wordnet.dominant_part_of_speech("have", lexicon) == "a verb"
    assert wordnet.dominant_part_of_speech("uniform", lexicon) is None
