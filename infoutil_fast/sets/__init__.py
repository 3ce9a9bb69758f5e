"""A distilled set on disk: written, read, reported."""
