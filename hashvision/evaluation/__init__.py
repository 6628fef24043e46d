"""What a trained network is good for: features, kNN, linear probe, multi-label, with intervals."""
