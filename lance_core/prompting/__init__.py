"""A short wish made into the detailed prompt that the weights were trained with."""
