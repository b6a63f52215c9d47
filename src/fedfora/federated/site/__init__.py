"""A site's side: its rows and base, its identity and memory, and how it answers."""
