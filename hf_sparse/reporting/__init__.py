"""Sparsity reports, tables and plots."""
