"""The benchmark of the GPU backend: right and fast, on a machine with a GPU; predictions without one."""
