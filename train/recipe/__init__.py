"""Recipes: from a YAML file to validated sections, before anything is read or loaded."""
