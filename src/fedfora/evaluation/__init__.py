"""Generation and scores."""
