"""How the effect of one dose of a steering vector depends on the step at which it is given."""
