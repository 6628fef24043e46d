"""The reasons for dropping a post, as the manifest names and counts them."""

# In the order of the checks.
REASONS = (
    "broken_line",  # not a JSON object in UTF-8, a key that occurs twice, or no usable id
    "private",  # visibility is not "public" on this line or another one with the same id
    "removed",  # the removal list names the post, its owner or its photo
    "broken_owner",  # an owner that a removal list cannot name: a list, an object, a fraction
    "overlong_text",  # more text or more tags than a person writes
    "duplicate_id",  # the dump has a later version of the post
    "path_outside",  # an absolute path, a URL, "..", or a link out of the image folder
    "missing_file",  # no file there, or not a regular file
    "broken_archive",  # the tar is compressed, damaged, or ends before the photo does
    "too_large",  # in bytes, in pixels, or in decoding cost (decompression bombs)
    "unknown_format",  # not JPEG, PNG, WebP, GIF, BMP, TIFF or PPM by content
    "undecodable",  # empty, truncated or broken
    "removed_copy",  # shows the photo of a removed post, unchanged or slightly edited
    "evaluation_photo",  # shows a photo of an evaluation set, unchanged or slightly edited
    "duplicate_photo",  # shows the photo of an older post, unchanged or slightly edited
    "no_tag",  # no tag that names a class
)

# Reports do not even give the dump offsets of these posts, to protect the people behind them.
CONFIDENTIAL = ("private", "removed", "removed_copy")


class Dropped(Exception):
    """Raised for a post that must be dropped; `reason` is one of REASONS."""

    def __init__(self, reason: str):
        """Stores the reason, one of REASONS."""
        super().__init__(reason)
        self.reason = reason
