"""Adapters to other people's frameworks."""
