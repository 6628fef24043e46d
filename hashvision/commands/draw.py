"""`hashvision draw`: draws posts and photos, so that everything runs without a download."""

import argparse
import os

from hashvision.commands import flags
from hashvision.commands.stopping import stoppable
from hashvision.config.ranges import SEED

HELP = "draw posts and photos, so that everything runs without a download"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument(
        "--output", required=True, help="folder for posts.jsonl, images/ and test sets"
    )
    parser.add_argument(
        "--posts", type=flags.COUNT, default=3000, help="number of posts (default: 3000)"
    )
    parser.add_argument(
        "--test_per_class",
        type=flags.COUNT,
        default=20,
        help="test photos per class (default: 20)",
    )
    parser.add_argument(
        "--seed", type=flags.within(SEED), default=0, help="another seed draws other posts"
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Draws the posts and a contact sheet of some of them."""
    flags.refuse_unknown(arguments, rest)
    from hashvision.synthetic import draw

    with stoppable():
        draw.write(arguments.output, arguments.posts, arguments.test_per_class, seed=arguments.seed)
        sheet = os.path.join(arguments.output, "contact_sheet.png")
        draw.draw_contact_sheet(sheet, seed=arguments.seed)
    print(f"{arguments.posts:,} drawn posts are in {arguments.output}; {sheet} shows some of them.")
