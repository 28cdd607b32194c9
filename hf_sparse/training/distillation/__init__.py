"""Distillation: a dense teacher whose logits and hidden states the pruned student learns to give."""
