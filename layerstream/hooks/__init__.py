"""Hooks and wrappers on modules, what torch.compile makes of them, and what forwards return."""
