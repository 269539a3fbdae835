"""From plan to action: `plan` says who owns what, `transfer` moves it."""
