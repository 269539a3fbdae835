"""The same step, fed by hooks: gradients are applied and freed inside backward."""
