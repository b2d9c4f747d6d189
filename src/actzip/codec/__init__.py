"""actzip.codec."""
