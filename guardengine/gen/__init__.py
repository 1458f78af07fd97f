"""Qwen3Guard-Gen: the backbone that answers in text, on the same engine."""
