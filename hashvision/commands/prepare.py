"""`hashvision prepare`: makes a dataset folder from a dump of posts."""

import argparse

from hashvision.commands import flags
from hashvision.commands.stopping import stoppable
from hashvision.config.ranges import SIDE

HELP = "make a dataset folder from a dump of posts"
DESCRIPTION = "Options not listed here go to Apache Beam (--runner, ...)."


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("--posts", required=True, help="a JSONL dump, one post per line")
    parser.add_argument("--output", required=True, help="path of the new dataset folder")
    parser.add_argument(
        "--images", help="folder that image paths are relative to; by default that of the posts"
    )
    parser.add_argument(
        "--wordnet", help="WordNet as WN-LMF (.xml, .xml.xz), to merge tags that are synonyms"
    )
    parser.add_argument(
        "--minimum_count",
        type=flags.COUNT,
        default=10,
        help="posts that a class needs (default: 10)",
    )
    parser.add_argument(
        "--short_side",
        type=flags.within(SIDE),
        default=384,
        help="larger photos are shrunk to this shorter side in pixels (default: 384). The smallest"
        " crops of SwAV and SEER cover 14%% of a photo: 166 pixels of 512 x 384 are enlarged to"
        " 224, but only 110 with 256. A photo takes twice the bytes that it takes with 256",
    )
    parser.add_argument(
        "--keep_untagged",
        action="store_true",
        help="keep photos without a class, to learn without tags",
    )
    parser.add_argument(
        "--keep_duplicates",
        action="store_true",
        help="keep photos that another post shows too",
    )
    flags.add_takedown(
        parser,
        removals="CSV of posts that must not be used: kind,value,reason,received_at",
        key="the dataset's key, made if it does not exist; by default OUTPUT.key",
    )
    parser.add_argument(
        "--evaluation_sets",
        type=flags.folders,
        default=[],
        help="folders, DIR,DIR, of photos that no post may show",
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Prepares the dataset and prints how many posts it keeps, and why it drops the others."""
    from hashvision.prepare import pipeline

    with stoppable():
        manifest = pipeline.prepare(
            arguments.posts,
            arguments.output,
            images=arguments.images,
            wordnet=arguments.wordnet,
            minimum_count=arguments.minimum_count,
            short_side=arguments.short_side,
            keep_untagged=arguments.keep_untagged,
            keep_duplicates=arguments.keep_duplicates,
            removals=arguments.removals,
            key=arguments.key,
            keep_copies_of_removed=arguments.keep_copies_of_removed,
            evaluation_sets=arguments.evaluation_sets,
            beam_options=rest,
        )
    posts = manifest["posts"]
    dropped = ", ".join(f"{drop['count']:,} {why}" for why, drop in posts["dropped"].items())
    print(
        f"{posts['kept']:,} of {posts['read']:,} posts kept ({dropped});"
        f" {manifest['classes']:,} classes; the dataset is in {arguments.output}."
    )
