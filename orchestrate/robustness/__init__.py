"""How much results depend on the order of tasks: tidy scores, and statistics that say what can't be known."""
