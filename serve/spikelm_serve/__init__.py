"""Using a trained model: the OpenAI-compatible server, the terminal chat and `generate`."""
