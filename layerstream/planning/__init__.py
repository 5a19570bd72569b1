"""What is on the device in each phase, what a pass does, what comes next. Pure: no torch, no device."""
