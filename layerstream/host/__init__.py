"""Bytes outside of the device: homes of units, page locks, and which memory is ours to lock."""
