"""The reasons for which a post does not come through, as the manifest names and counts them."""

# In the order in which they are asked.
REASONS = (
    "broken_line",  # no JSON object in UTF-8, a key twice, or no id that can be used
    "private",  # visibility is not "public", on this line or on another of the same id
    "removed",  # the removal list names the post, its owner or its photo
    "broken_owner",  # an owner that no removal list could name: a list, an object, a fraction
    "overlong_text",  # more text or more tags than a person writes
    "duplicate_id",  # a later state of the post is in the dump
    "path_outside",  # absolute, an address, with "..", or a link out of the images' folder
    "missing_file",  # nothing lies there, or no plain file
    "broken_archive",  # the tar is compressed, garbage, or ends before the photo does
    "too_large",  # in bytes, in pixels, or in the work that decoding it would be: bombs
    "unknown_format",  # neither JPEG, PNG, WebP, GIF, BMP nor TIFF, whatever the file's name
    "undecodable",  # empty, truncated or broken
    "removed_copy",  # shows the photo of a removed post, as it is or edited a little
    "evaluation_photo",  # shows a photo of an evaluation set, as it is or edited a little
    "duplicate_photo",  # shows the photo of an older post, as it is or edited a little
    "no_tag",  # no tag that names a class
)

# Of these not even the place in the dump is told: who was removed is nobody's business.
UNTOLD = ("private", "removed", "removed_copy")


class Dropped(Exception):
    """A post does not come through; `reason` is one of REASONS."""

    def __init__(self, reason: str):
        """Takes the reason."""
        super().__init__(reason)
        self.reason = reason
