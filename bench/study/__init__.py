"""Compare the rules for w_t: training runs with tuned learning rates and several seeds."""
