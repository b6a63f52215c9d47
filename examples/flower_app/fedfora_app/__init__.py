"""All that travels of a run. Each side runs what it installed."""
