"""From pixels to features: views, tiles, augmentation, backbones, and the store that keeps what was computed."""
