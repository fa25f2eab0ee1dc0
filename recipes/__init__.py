"""The recipes that come with the package; `dic-repa recipes` lists them."""
