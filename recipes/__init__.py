"""A package, so that `from recipes import arithmetic` cannot find the `recipes` of torchtune."""
