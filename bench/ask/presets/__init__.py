"""Presets: one TOML file each, named on the command line by its file name."""
