"""Preference training of one attribute: pairs of answers, the recipe, and the adapter that comes of both."""
