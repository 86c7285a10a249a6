"""Launch shapes and rewrites of the kernels, timed on a GPU."""
