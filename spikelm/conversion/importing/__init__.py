"""Checkpoints of other projects, read into model folders of this one."""
