"""What `make` and the release workflow run beside the tests; in the repository only."""
