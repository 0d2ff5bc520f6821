"""The command line: parsing, error messages and the folders of runs."""
