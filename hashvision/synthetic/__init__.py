"""Draws posts and their photos, so that everything runs without a download."""
