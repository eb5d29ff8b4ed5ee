"""Frozen networks that others learn from: an image tokenizer, and the objective distillation."""
