"""From a placed model and a name to an optimizer."""
