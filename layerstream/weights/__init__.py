"""What a parameter is while its bytes are elsewhere: absent, bound, or handed back. No device, no streams."""
