"""The search for the shortest way to the report's accuracy: its runs and their table."""
