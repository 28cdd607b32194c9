"""Pruning inside a Trainer."""
