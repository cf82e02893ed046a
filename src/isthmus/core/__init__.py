"""Shared nouns: model, ids, units, errors, clock, settings. Imports nothing else of isthmus."""
