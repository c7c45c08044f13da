"""Architectures: one file each, named as the `model_type` in config.json."""
