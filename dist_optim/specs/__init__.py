"""What an optimizer is: its hyperparameters, how its class is driven, and the table of names."""
