"""The command line: words in, tables out. One file per command; imported as `adaptlib.cli`."""
