"""actzip.cli."""
