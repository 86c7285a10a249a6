"""Launch shapes of the step kernel, timed on a GPU."""
