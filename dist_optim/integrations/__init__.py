"""Doors to the frameworks. Each file imports its framework on use, and translates only."""
