"""Adapters to training frameworks; importing a module registers AdaX with its framework."""
