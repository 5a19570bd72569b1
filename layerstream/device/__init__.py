"""What is asked of a device, CUDA, and a simulated device. Knows memory, streams, copies and events; no weights."""
