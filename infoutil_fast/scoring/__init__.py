"""Scores of any images, and how accurate the Shapley designs are on a teacher."""
