"""Text made ready to train on."""
