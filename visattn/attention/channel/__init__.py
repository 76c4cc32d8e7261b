"""Attention over channels: one weight a channel."""
