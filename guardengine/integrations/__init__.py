"""Adapters to the streams, loops and objects of other software. Nothing here is imported by the rest of the package."""
