"""What the optimising methods share: experts, synthetic images, gradients of matching."""
