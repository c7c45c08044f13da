"""Named studies: variants of a recipe, trained with several seeds, converted and compared."""
