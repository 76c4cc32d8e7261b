"""Attention over positions, or over channels and positions."""
