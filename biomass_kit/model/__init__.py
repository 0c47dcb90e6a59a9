"""The network that turns features into grams, and what it is trained for."""
