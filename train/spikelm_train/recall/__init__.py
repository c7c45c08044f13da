"""The recall study: how many pairs small models of every mixer remember, and in which state."""
