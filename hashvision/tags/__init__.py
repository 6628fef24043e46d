"""Turns the text of posts into classes: extracts, folds, measures and merges hashtags."""
