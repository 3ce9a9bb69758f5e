"""What the training-free methods share: windows ranked, chosen, stitched."""
