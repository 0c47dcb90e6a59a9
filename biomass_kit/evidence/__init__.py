"""What a gain is measured with: probe, paired differences, fold strategies, stacking, search."""
