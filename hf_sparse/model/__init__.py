"""The prunable layers and the repeated blocks of a model, found from its module structure."""
