"""Streaming: who may come in, which units are on the device and when, phases, edits, entering and leaving."""
