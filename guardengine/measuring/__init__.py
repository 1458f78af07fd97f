"""What measurements share: the machine and its ceilings, files of numbers, pictures."""
