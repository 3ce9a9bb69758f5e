"""Pictures and pages, drawn in memory: no display needed."""
