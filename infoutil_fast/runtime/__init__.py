"""Where and how things run: device, memory, files, seeds."""
