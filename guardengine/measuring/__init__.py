"""Shared by measurements: the machine and its ceilings, files of numbers, pictures, random ids."""
