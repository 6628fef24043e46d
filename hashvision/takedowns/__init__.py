"""Which removed photos a dataset still holds, and which checkpoints saw them."""
