"""The soak: minutes of a service's life, every label and all books checked."""
