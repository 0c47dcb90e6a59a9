"""From a competition folder to a bundle: options, the loop, a run and its scores."""
