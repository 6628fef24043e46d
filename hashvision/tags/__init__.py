"""From the text of posts to classes: extract, fold, measure and merge hashtags."""
