"""From a bundle and photos to consistent grams, with intervals, against a clock."""
