"""What ranks do together: agree, compare, fail together."""
