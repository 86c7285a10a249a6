"""Adapters to training frameworks, one module each; importing a module registers AdaX with its framework."""
