"""Smaller models from zeros: coupled units that are zero are removed from the weights and from the config."""
