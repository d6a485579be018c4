"""Presets: YAML files laid over the defaults of `omni.config`."""
