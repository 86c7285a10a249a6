"""From param_groups to launches."""
