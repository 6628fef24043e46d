"""Drawn posts, so that everything runs without a download."""
