"""Everything that knows processes: the command line, helper processes, who started this one, and how they end."""
