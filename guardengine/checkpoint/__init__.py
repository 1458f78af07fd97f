"""Checkpoints: from files to a ModelConfig and weights, and random ones for machines without weights."""
