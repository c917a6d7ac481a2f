"""The comparisons of the four papers at the scale of the bundled base: `adaptlib bench papers`."""
