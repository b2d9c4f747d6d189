"""actzip.sparsify."""
