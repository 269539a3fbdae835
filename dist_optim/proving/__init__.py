"""Whether the tensors of an optimizer that nobody described are independent of each other: traced, and tried."""
