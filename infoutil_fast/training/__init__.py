"""Training of teachers and students, and how good a set is."""
