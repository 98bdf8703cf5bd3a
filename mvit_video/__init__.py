"""MViTv2 for video: train, evaluate and use it."""
