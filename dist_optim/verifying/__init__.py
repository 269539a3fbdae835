"""The unmodified upstream optimizer beside ours: stepped in one process, from the same gradients, and compared."""
