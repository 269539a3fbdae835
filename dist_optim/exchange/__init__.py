"""How tensors move: `routing` and `plan` say what goes where, `transfer` moves it, `norms` measures it."""
