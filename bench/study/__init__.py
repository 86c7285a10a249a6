"""Compare rules for w_t in training, with tuned learning rates."""
