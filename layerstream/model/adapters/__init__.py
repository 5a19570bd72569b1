"""Which modules of a component stream: descriptions only, nothing is moved here."""
