"""Small modules and data for bug reports, with Lightning's names."""
