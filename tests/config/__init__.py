"""Config: composition, errors, plugins."""
