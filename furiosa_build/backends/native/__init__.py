"""The native backend: programs are lists of calls of the project's own kernels, which one library holds."""
