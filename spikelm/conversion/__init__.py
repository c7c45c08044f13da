"""Trained checkpoints in, spike-coded checkpoints out."""
