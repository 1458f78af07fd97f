"""Engine and Stream, AsyncEngine and AsyncStream, and the thread between them."""
