"""What ranks do together: agree, compare, fail together, and notice who is gone."""
