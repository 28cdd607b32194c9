"""Selection of the units to prune: thresholds, masks by row and integer budgets, exact over chunks and ranks."""
