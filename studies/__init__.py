"""Studies: many runs, one verdict. Arms by seeds are run by the ordinary command line, and claims are weighed."""
