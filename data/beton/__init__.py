"""The .beton file format: writing, reading, checking."""
