"""An LLM's deltas in, what is cleared out."""
