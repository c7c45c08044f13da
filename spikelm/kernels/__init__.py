"""Recurrences and integer products: the specification and its faster forms."""
