"""Training of the flow network on generated motion. Nothing of `omni` or `preprocess` needs it."""
