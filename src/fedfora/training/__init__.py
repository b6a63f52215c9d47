"""One participant trains: the only training loop."""
