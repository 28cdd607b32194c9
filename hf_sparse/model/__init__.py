"""What of a model can be pruned: layers and blocks, found by structure."""
