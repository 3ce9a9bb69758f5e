"""Nets by name, pretrained ones, teachers, and other projects' checkpoints."""
