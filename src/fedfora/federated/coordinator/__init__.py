"""The coordinator's side: who takes part, what becomes of their replies, what is kept."""
