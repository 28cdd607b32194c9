"""Which units are pruned: thresholds, rankings and budgets, exact over chunks and ranks."""
