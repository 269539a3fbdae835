"""How tensors move: `routing` and `plan` say who owns what and what travels, `transfer` moves it, `norms` measures it."""
