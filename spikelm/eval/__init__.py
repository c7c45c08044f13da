"""Measuring models: quality, silence, weight traffic, time and memory against length."""
