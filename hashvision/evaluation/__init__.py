"""Evaluation of trained networks: kNN, linear probe and multi-label metrics, with intervals."""
