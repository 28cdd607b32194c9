"""The options of pruning."""
