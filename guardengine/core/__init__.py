"""The core: the books of all streams, KV blocks, the queue, and the step."""
