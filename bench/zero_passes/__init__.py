"""Memory traffic of a step under ZeRO."""
