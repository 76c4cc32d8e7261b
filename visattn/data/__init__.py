"""Data for training and evaluation; knows nothing of models. Import what you need: this file loads nothing."""
