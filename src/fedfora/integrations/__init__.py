"""Bridges to other systems; each is optional and imported only on demand."""
