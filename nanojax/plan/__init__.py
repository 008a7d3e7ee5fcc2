"""Says before a run what it needs: memory on a card that may be absent, days, kilowatt hours, money."""
