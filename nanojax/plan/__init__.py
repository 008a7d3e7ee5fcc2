"""Plans a run: memory on a GPU that may be absent, days, kilowatt hours, money."""
