"""How tensors are stepped: one upstream optimizer with ghosts, one training step, and what is checked around it."""
