"""`infoutil bench`: entrants, timed parts, tables and plots."""
