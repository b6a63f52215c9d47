"""Adapters in the forms that others load."""
