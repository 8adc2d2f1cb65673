"""How good sampled text is, how it compares with controls, and the report that shows it."""
