"""The routing report of a run: one page, from the run's folder alone."""
