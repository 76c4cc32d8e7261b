"""Attention between positions: every position reads every other."""
