"""Merges tags into classes for `prepare`, by WordNet senses and plurals, and records the reasons.

Two rules exclude tags that name nothing visible. By WordNet: the tag is not a noun, or its sense is
of a kind that cannot be photographed. By the posts: the tag is independent of what its posts show.
"""

import typing
from collections import Counter, defaultdict
from collections.abc import Mapping

from hashvision.tags import wordnet
from hashvision.tags.spread import Spread

# WordNet's lexicographer files. Nouns in VISIBLE can be photographed. Some nouns in DOUBTFUL can (a
# wave is an event, football an act, sunset a time); their tags must depend on what the posts show.
VISIBLE = frozenset("animal artifact body food object person phenomenon plant substance".split())
DOUBTFUL = frozenset("act attribute communication event group location shape time".split())

LEFT_OUT_LISTED = 1000
# Excluded tags of fewer posts are not listed, because they may name a person
# (#annaschmidtbirthday1987) and show little of the rules. Equal to the default of minimum_count.
LEFT_OUT_POSTS = 10


class Candidate(typing.NamedTuple):
    """A class before the frequency cutoff."""

    name: str  # its commonest tag, in the singular
    synset: str | None
    lemmas: tuple[str, ...]
    why: str


class Assignment(typing.NamedTuple):
    """The candidate class of each tag, and why the other tags have none."""

    classes: dict[str, str]  # tag -> key in candidates
    candidates: dict[str, Candidate]
    left_out: dict[str, str]  # tag -> why


def assign(
    counts: Mapping[str, int], spreads: Mapping[str, Spread], lexicon: wordnet.Lexicon | None
) -> Assignment:
    """Merges tags into candidate classes and excludes those that name nothing visible.

    Args:
      counts: number of posts that have each folded tag.
      spreads: results of `measure_tag` for the tags that are frequent enough.
      lexicon: WordNet, or None to merge by spelling only.
    """
    bases = _bases(counts, lexicon)
    uses: Counter[str] = Counter()
    for tag, base in bases.items():
        uses[base] += counts[tag]
    groups: dict[str, list[str]] = defaultdict(list)
    left_out: dict[str, str] = {}
    chosen: dict[str, int] = {}
    for tag, base in sorted(bases.items()):
        if lexicon is None:
            groups[base].append(tag)
        elif base not in lexicon.nouns:
            left_out[tag] = f"names no noun in {lexicon.name}"
        elif other := wordnet.dominant_part_of_speech(base, lexicon):
            left_out[tag] = f"is {other} more than a noun in {lexicon.name}"
        else:
            if base not in chosen:
                chosen[base] = wordnet.choose_sense(base, uses, lexicon)
            groups[lexicon.synsets[chosen[base]].id].append(tag)
    senses = [lexicon.synsets[sense] for sense in chosen.values()] if lexicon else []
    synsets = {synset.id: synset for synset in senses}
    classes: dict[str, str] = {}
    candidates: dict[str, Candidate] = {}
    for key, tags in groups.items():
        tags.sort(key=lambda tag: (-counts[tag], tag))
        kept, reasons = _filter_group(tags, spreads, synsets.get(key))
        left_out.update(reasons)
        if kept:
            classes.update(dict.fromkeys(kept, key))
            candidates[key] = _candidate(kept[0], bases, spreads, synsets.get(key), lexicon)
    return Assignment(classes, candidates, left_out)


def _bases(counts: Mapping[str, int], lexicon: wordnet.Lexicon | None) -> dict[str, str]:
    bases = {tag: _base(tag, counts, lexicon) for tag in counts}
    if lexicon is None:
        # A singular may itself be a plural. Each step leads to a commoner tag, so the loop ends.
        for tag, base in bases.items():
            while bases[base] != base:
                base = bases[base]
            bases[tag] = base
    return bases


def _base(tag: str, counts: Mapping[str, int], lexicon: wordnet.Lexicon | None) -> str:
    """The singular of a tag that is a plural, otherwise the tag.

    A form that is also a noun itself (#shorts, #glasses) counts as a plural only if its singular is
    the commoner tag.
    """
    known = counts if lexicon is None else lexicon.nouns
    singulars = [s for s in wordnet.singulars(tag) if s in known and len(s) > 1]
    if lexicon is not None and tag in lexicon.forms:
        singulars.insert(0, lexicon.forms[tag])
    if not singulars:
        return tag
    best = max(singulars, key=lambda s: counts.get(s, 0))
    own = lexicon is None or tag in lexicon.nouns
    return tag if own and counts.get(best, 0) <= counts[tag] else best


def _filter_group(
    tags: list[str], spreads: Mapping[str, Spread], synset: wordnet.Synset | None
) -> tuple[list[str], dict[str, str]]:
    """Returns the tags that stay, commonest first, and why the others are excluded."""
    reasons: dict[str, str] = {}
    if synset is not None and synset.kind not in ("", *VISIBLE):
        spread = spreads.get(tags[0])
        if synset.kind not in DOUBTFUL:
            why = f"noun.{synset.kind} names nothing visible ({synset.id})"
        elif spread is None or not spread.content_dependent:
            why = f"noun.{synset.kind} may name nothing visible ({synset.id}), and its posts " + (
                "are too few to tell" if spread is None else f"differ by only {spread}"
            )
        else:
            why = None
        if why:
            return [], dict.fromkeys(tags, why)
    for tag in tags:
        spread = spreads.get(tag)
        if spread is not None and spread.content_independent:
            reasons[tag] = f"comes evenly, whatever its posts show: they differ by {spread}"
    if tags[0] in reasons:
        for tag in tags[1:]:
            reasons.setdefault(tag, f"goes with #{tags[0]}, which comes evenly")
    return [tag for tag in tags if tag not in reasons], reasons


def _candidate(
    tag: str,
    bases: Mapping[str, str],
    spreads: Mapping[str, Spread],
    synset: wordnet.Synset | None,
    lexicon: wordnet.Lexicon | None,
) -> Candidate:
    spread = spreads.get(tag)
    evidence = f"its posts differ from all posts by {spread}" if spread else "too rare to measure"
    if synset is None or lexicon is None:
        return Candidate(bases[tag], None, (), f"merged by spelling; {evidence}")
    senses = lexicon.nouns[bases[tag]]
    place = next(i for i, s in enumerate(senses, 1) if lexicon.synsets[s].id == synset.id)
    kind = f"noun.{synset.kind}" if synset.kind else "noun"
    why = f"{kind}, sense {place} of {len(senses)}: {synset.definition}; {evidence}"
    return Candidate(bases[tag], synset.id, synset.lemmas, why)


def finish(
    assignment: Assignment,
    counts: Mapping[str, int],
    class_counts: Mapping[str, int],
    minimum_count: int,
    wordnet_name: str | None,
) -> dict[str, typing.Any]:
    """Drops rare classes, orders the others, and returns the content of vocabulary.json.

    Args:
      assignment: from `assign`.
      counts: number of posts that have each tag.
      class_counts: number of posts that have each candidate class.
      minimum_count: number of posts that a class needs.
      wordnet_name: name of the WordNet that merged the tags, or None.
    """
    tags: dict[str, dict[str, int]] = defaultdict(dict)
    for tag in sorted(assignment.classes, key=lambda tag: (-counts[tag], tag)):
        tags[assignment.classes[tag]][tag] = counts[tag]
    left_out = dict(assignment.left_out)
    classes = []
    for key, candidate in assignment.candidates.items():
        count = class_counts.get(key, 0)
        if count < minimum_count:
            why = f"its class has {count} posts, fewer than minimum_count {minimum_count}"
            left_out.update(dict.fromkeys(tags[key], why))
            continue
        classes.append(
            {
                "name": candidate.name,
                "count": count,
                "tags": tags[key],
                "synset": candidate.synset,
                "lemmas": list(candidate.lemmas),
                "why": candidate.why,
            }
        )
    classes.sort(key=lambda entry: (-entry["count"], entry["name"]))
    common = [tag for tag in left_out if counts[tag] >= LEFT_OUT_POSTS]
    listed = sorted(common, key=lambda tag: (-counts[tag], tag))[:LEFT_OUT_LISTED]
    return {
        "minimum_count": minimum_count,
        "wordnet": wordnet_name,
        "classes": classes,
        "left_out": [{"tag": tag, "count": counts[tag], "why": left_out[tag]} for tag in listed],
    }
