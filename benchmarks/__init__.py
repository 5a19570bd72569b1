"""Measurements. A result is what these programs wrote, never edited by hand."""
