"""Where and how things run: device, memory, files, seeds; and the rows of results."""
