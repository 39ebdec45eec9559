"""All that the author of a strategy meets: its declaration, sites, inputs, options and decisions."""
