"""The pruning engine: observe, update, enforce."""
