"""The commands: arguments and configuration in, one clear line out."""
