"""Finds removed photos that a dataset still holds, and checkpoints that were trained on them."""
