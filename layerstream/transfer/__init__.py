"""One unit's way to the device and back: its state, its slots, its loads, and what is told of them."""
