"""The benchmark: `python -m guardengine.bench` measures the engine and, on request, transformers beside it."""
