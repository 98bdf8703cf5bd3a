"""What each task brings to the commands: its data, its model and its Lightning module."""
