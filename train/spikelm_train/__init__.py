"""Pretraining on Accelerate: recipes, data, optimisers, the loop, checkpoints that resume."""
