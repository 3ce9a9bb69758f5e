"""What is done to pixels before a net sees them: augmentation, normalisation, whitening."""
