"""Tests of merging tags into classes."""

import functools
import pathlib
from collections import Counter

import numpy as np
import pytest

from hashvision.sources import posts
from hashvision.tags import hashtags
from hashvision.tags.spread import (
    DEPENDENCE_THRESHOLD,
    MINIMUM_USES_DEPENDENT,
    MINIMUM_USES_INDEPENDENT,
    Spread,
    measure_spread,
)
from hashvision.tags.vocabulary import Assignment, assign, finish
from hashvision.tags.wordnet import Lexicon, Synset, load_wordnet

INDEPENDENT = Spread(0.1, 0.05, 0.0, 200, 200)
DEPENDENT = Spread(1.5, 0.05, 0.0, 200, 200)
UNSURE = Spread(0.4, 0.2, 0.0, 40, 30)


def lexicon() -> Lexicon:
    synsets = [
        Synset("bear", "animal", ("brown bear", "bruin", "Ursus arctos"), "a bear", 4),
        Synset("dog", "animal", ("dog",), "a dog", 20),
        Synset("love", "feeling", ("love",), "a feeling", 20),
        Synset("wave", "event", ("wave",), "a ridge of water", 9),
        Synset("surf", "event", ("surf",), "waves breaking", 2),
        Synset("fun", "act", ("fun",), "", 9),
        Synset("pal", "person", ("friend", "pal"), "", 9),
        Synset("shorts", "artifact", ("shorts",), "", 5),
        Synset("short", "artifact", ("short",), "", 2),
        Synset("rock", "object", ("rock",), "", 9),
        Synset("small", "body", ("small",), "", 2),
        Synset("ox", "animal", ("ox",), "", 2),
        Synset("idea", "", ("idea",), "from a WordNet without files", 2),
    ]
    nouns = {
        hashtags.fold(lemma): [number]
        for number, synset in enumerate(synsets)
        for lemma in synset.lemmas
    }
    return Lexicon("test:1", synsets, nouns, {"oxen": "ox"}, {"small": 11}, {})


def groups(made: Assignment) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for tag, key in made.classes.items():
        found.setdefault(key, set()).add(tag)
    return found


def test_synonyms_and_plurals_merge_into_one_synset():
    counts = dict(brownbear=5, ursusarctos=3, bruins=1, dog=50, dogs=9, oxen=4, idea=1)
    made = assign(counts, {}, lexicon())
    assert groups(made) == {
        "bear": {"brownbear", "ursusarctos", "bruins"},
        "dog": {"dog", "dogs"},
        "ox": {"oxen"},
        "idea": {"idea"},
    }
    assert made.candidates["bear"].lemmas == ("brown bear", "bruin", "Ursus arctos")
    assert "noun.animal, sense 1 of 1: a bear" in made.candidates["bear"].why
    assert not made.left_out


def test_a_plural_that_is_also_a_noun_merges_if_its_singular_is_commoner():
    assert groups(assign(dict(shorts=44, short=10), {}, lexicon())).keys() == {"shorts", "short"}
    assert groups(assign(dict(shorts=4, short=10), {}, lexicon())) == {"short": {"shorts", "short"}}


def test_exclusion_by_wordnet():
    counts = dict(love=9, instagood=9, small=9, smalls=2, dog=9)
    made = assign(counts, {}, lexicon())
    assert made.classes == {"dog": "dog"}
    assert made.left_out["instagood"] == "names no noun in test:1"
    assert made.left_out["love"] == "noun.feeling names nothing visible (love)"
    assert made.left_out["small"].startswith("is an adjective or adverb")
    assert made.left_out["smalls"].startswith("is an adjective or adverb")


def test_doubtful_kinds_must_depend_on_the_content():
    counts = dict(wave=60, waves=5, surf=60, fun=300)
    made = assign(counts, {"wave": DEPENDENT, "surf": UNSURE}, lexicon())
    assert groups(made) == {"wave": {"wave", "waves"}}
    assert "differ by only 0.40" in made.left_out["surf"]
    assert "too few to tell" in made.left_out["fun"]


def test_exclusion_by_posts():
    counts = dict(friend=400, friends=9, pal=3, dog=900, dogs=100, rock=30)
    spreads = {"friend": INDEPENDENT, "dog": DEPENDENT, "dogs": INDEPENDENT, "rock": UNSURE}
    for wordnet in (lexicon(), None):
        made = assign(counts, spreads, wordnet)
        assert made.left_out["friend"].startswith("comes evenly, whatever its posts show")
        assert made.left_out["friends"] == "goes with #friend, which comes evenly"
        assert "dogs" in made.left_out and "dog" in made.classes and "rock" in made.classes
        assert ("pal" in made.left_out) == (wordnet is not None)


def test_merging_by_spelling_only():
    counts = dict(dog=50, dogs=9, domesticdog=4, shorts=44, short=10, puppies=3, puppy=3, puppys=1)
    made = assign(counts, {}, None)
    assert sorted(groups(made).values(), key=sorted) == [
        {"dog", "dogs"},
        {"domesticdog"},
        {"puppies"},  # not commoner than its singular
        {"puppy", "puppys"},
        {"short"},
        {"shorts"},
    ]
    assert made.candidates["dog"].synset is None
    chain = assign({"a1": 9, "a1s": 5, "a1ses": 2}, {}, None)
    assert groups(chain) == {"a1": {"a1", "a1s", "a1ses"}}


def test_finish_drops_rare_classes_orders_the_rest_and_gives_reasons():
    counts = dict(dog=9, dogs=50, brownbear=17, bruin=4, ox=13, love=80)
    made = assign(counts, {"dogs": DEPENDENT}, lexicon())
    done = finish(made, counts, {"dog": 55, "bear": 20, "ox": 13}, 20, "test:1")
    assert [(c["name"], c["count"], c["tags"]) for c in done["classes"]] == [
        ("dog", 55, {"dogs": 50, "dog": 9}),
        ("brownbear", 20, {"brownbear": 17, "bruin": 4}),
    ]
    assert list(done["classes"][0]) == ["name", "count", "tags", "synset", "lemmas", "why"]
    assert [(o["tag"], o["count"]) for o in done["left_out"]] == [("love", 80), ("ox", 13)]
    assert done["left_out"][1]["why"] == "its class has 13 posts, fewer than minimum_count 20"
    assert (done["minimum_count"], done["wordnet"]) == (20, "test:1")


@pytest.mark.parametrize("wordnet", [lexicon(), None])
def test_excluded_tags_of_few_posts_are_not_listed(wordnet):
    counts = dict(dog=50, love=80, annaschmidtbirthday1987=1, annaschmidt=9, annaschmidts=1, fun=10)
    done = finish(assign(counts, {}, wordnet), counts, {"dog": 50}, 10, None)
    assert "annaschmidt" not in str(done)
    named = [entry["tag"] for entry in done["left_out"]]
    assert named == (["love", "fun"] if wordnet else named) and "fun" in named


def test_the_list_of_excluded_tags_is_bounded():
    counts = {f"x{n}y": n for n in range(3000)}
    done = finish(assign(counts, {}, lexicon()), counts, {}, 10, "test:1")
    assert len(done["left_out"]) == 1000
    assert done["left_out"][0]["tag"] == "x2999y"


SPAM = """love instagood beautiful friend happy cute throwback photooftheday picoftheday life family
instagram fun instadaily amazing vsco weekend followme tbt nofilter mood instapic selfie tb
bestoftheday goodvibes like4like l4l travel summer holiday""".split()
CONTENT = """dog man boy woman girl child shirt grass ball snow rock beach bike street mouth jacket
tree mountain pool toy wall face hat hill building hand stick car road skateboard dress""".split()


@functools.cache
def measure_real(path: pathlib.Path) -> tuple[Counter[str], dict[str, Spread]]:
    """Counts and spreads of the tags of the real public posts, without Beam."""
    contexts = []
    with open(path, "rb") as file:
        for _, line in posts.read_lines(file, 0, 2**40):
            try:
                post = posts.parse(line or b"")
            except posts.Dropped:
                continue
            if post.visibility == "public":
                tags = set(map(hashtags.fold, hashtags.extract(post.text)))
                contexts.append((tags, set(hashtags.words(post.text))))
    counts = Counter(tag for tags, _ in contexts for tag in tags)
    words = Counter(word for _, said in contexts for word in said)
    terms = [word for word, _ in words.most_common(1000)]
    has = np.array([[term in said for term in terms] for _, said in contexts])
    spreads = {}
    for tag, uses in counts.items():
        if uses >= MINIMUM_USES_DEPENDENT:
            of_tag = has[[tag in tags for tags, _ in contexts]].sum(0)
            own = terms.index(tag) if tag in terms else None
            spreads[tag] = measure_spread(of_tag, has.sum(0), uses, len(contexts), own)
    return counts, spreads


@pytest.mark.realdata
def test_real_spam_and_content_are_separated(shared_data: pathlib.Path):
    counts, spreads = measure_real(shared_data / "posts" / "posts.jsonl")
    upper = {
        tag: s.effect + s.own + 2 * s.error
        for tag, s in spreads.items()
        if s.uses >= MINIMUM_USES_INDEPENDENT
    }
    assert max(upper[tag] for tag in SPAM if tag in upper) < DEPENDENCE_THRESHOLD - 0.15
    assert min(value for tag, value in upper.items() if tag not in SPAM) > DEPENDENCE_THRESHOLD + 1
    made = assign(counts, spreads, None)
    assert {tag for tag, why in made.left_out.items() if "evenly" in why} == set(SPAM)
    assert set(CONTENT) <= made.classes.keys()


@pytest.mark.realdata
@pytest.mark.slow
def test_real_vocabulary_merges_synonyms_and_excludes_spam(shared_data: pathlib.Path):
    counts, spreads = measure_real(shared_data / "posts" / "posts.jsonl")
    oewn = load_wordnet(str(shared_data / "wordnet" / "oewn-2025.xml.xz"))
    made = assign(counts, spreads, oewn)
    assert not set(SPAM) & made.classes.keys()
    assert set(CONTENT) <= made.classes.keys()
    same = [("dog", "dogs", "canisfamiliaris", "domesticdog"), ("woman", "womans", "adultfemale")]
    same += [("man", "mans", "adultmale"), ("boy", "malechild"), ("child", "kid", "childs")]
    same += [("mouth", "rimaoris"), ("bike", "bicycle"), ("rock", "stone"), ("beach", "beachs")]
    for tags in same:
        assert len({made.classes[tag] for tag in tags}) == 1, tags
    apart = "man boy woman girl child baby guy cat dog bike motorcycle".split()
    assert len({made.classes[tag] for tag in apart}) == len(apart)
    # Merging by WordNet does not depend on the tags of this dump.
    bears = assign(dict(brownbear=3, ursusarctos=2, bruin=1, polarbear=9), {}, oewn)
    assert len(set(bears.classes.values())) == 2
