"""The coordinator's side: who takes part, what happens to their replies, what is kept."""
