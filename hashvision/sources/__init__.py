"""Reads posts and photos from dumps: opens, checks and decodes them for every command."""
