"""What a run needs on devices that are not at hand: memory, speed and price."""
